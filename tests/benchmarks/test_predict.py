"""The model of a step's time on a GPU: its prices, its lists, its place in the report."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.predict import counts, kernel_list
from benchmarks.predict.categories import (
    ATTENTION,
    FP8_PRODUCTS,
    PRODUCTS,
    eager_category,
    extern_category,
    triton_category,
)
from benchmarks.predict.generated import kernels_of_graph
from benchmarks.predict.measured import us_by_category
from benchmarks.predict.model import GPUS, KERNEL_US, by_category, can_run, kernel_us, total
from benchmarks.report import MODEL, split_modelled, table
from benchmarks.results import read
from fastirt.kernels.counts.kernel import MOST_THRESHOLDS, SLICE
from fastirt.kernels.counts.similarities import TILES
from fastirt.kernels.gates.known import CEILINGS
from tests.helpers import ROOT

DEFAULT, SIZES = "+ CUDA graph", {"model": "deit_small_patch16_224", "input_size": 224, "batch_size": 64}
# (launches, ms) on an H200: a change that makes the step dearer is noticed here.
EXPECTED = {DEFAULT: (680, 6.582), "graph, bf16 weights": (538, 5.852), "graph, momentum twin": (889, 8.655)}
ALLOWED = 1.01


def committed(row, batch_size=64):
    return next(
        content
        for content in kernel_list.read_all()
        if content["row"] == row and content["sizes"]["batch_size"] == batch_size
    )


def kernel(category="other", launches=1, bytes=0, flops=0, count=1, name="triton_poi_fused_add_0"):
    return dict(
        phase="forward 0", category=category, name=name, launches=launches, bytes=bytes, flops=flops, count=count
    )


def check_cost(kernels, launches, ms):
    """Fails where the model says over 1 % more launches or milliseconds on an H200."""
    cost = total(kernels, GPUS["H200"])
    assert cost.us / 1e3 <= ms * ALLOWED, f"the model says {cost.us / 1e3:.3f} ms, it said {ms:.3f}"
    assert cost.launches <= launches * ALLOWED, f"{cost.launches} launches, there were {launches}"


@pytest.mark.parametrize("row", EXPECTED)
def test_the_predicted_step_does_not_get_slower(row):
    content = committed(row)
    assert content["sizes"] == {**SIZES, "slots": 59551}
    check_cost(content["kernels"], *EXPECTED[row])


def test_a_dearer_step_is_noticed():
    kernels = committed(DEFAULT)["kernels"]
    with pytest.raises(AssertionError, match="the model says 6.*ms, it said 6.582"):  # a copy of all weights, twice
        check_cost([*kernels, kernel(bytes=2 * 22e6 * 8)], *EXPECTED[DEFAULT])
    with pytest.raises(AssertionError, match="696 launches, there were 680"):
        check_cost([*kernels, kernel(count=16)], *EXPECTED[DEFAULT])


@pytest.mark.slow
@pytest.mark.compile
def test_a_list_made_again_is_the_committed_one(tmp_path):
    """Of a row whose list tests/fake_cuda/test_generated.py does not make."""
    row = "graph, patch matmul"
    before = committed(row)
    if torch.version.cuda is None or torch.__version__ != before["torch"]:
        pytest.skip(f"the list is of torch {before['torch']}, this is {torch.__version__}")
    command = [sys.executable, "-m", "benchmarks.predict.record", row, "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (fresh,) = tmp_path.glob("*.json")
    assert fresh.read_text() == (kernel_list.FOLDER / fresh.name).read_text()


def test_a_kernel_takes_the_longest_of_bytes_operations_and_launch():
    h200, h100 = GPUS["H200"], GPUS["H100"]
    assert kernel_us(kernel(bytes=4.3e6 * 50), h200) == pytest.approx(50)
    assert kernel_us(kernel(PRODUCTS, bytes=8, flops=0.75 * 790e6 * 30), h200) == pytest.approx(30)
    assert kernel_us(kernel(ATTENTION, flops=200e6 * 7), h200) == pytest.approx(7)
    assert kernel_us(kernel(bytes=8, launches=3), h200) == 3 * KERNEL_US
    assert kernel_us(kernel(bytes=4.3e6 * 50), h100) == pytest.approx(50 * 4.8 / 3.35)
    assert kernel_us(kernel(FP8_PRODUCTS, flops=0.75 * 790e6 * 30), h100) == pytest.approx(15)
    assert [can_run([kernel(FP8_PRODUCTS)], gpu) for gpu in GPUS.values()] == [True, True, False]


def test_sums_count_every_kernel():
    kernels = [kernel(bytes=4.3e6 * 50, count=3), kernel(PRODUCTS, launches=2, flops=10, count=2)]
    whole, parts = total(kernels, GPUS["H200"]), by_category(kernels, GPUS["H200"])
    assert (whole.launches, whole.flops) == (7, 20)
    assert whole.us == pytest.approx(150 + 8) == sum(cost.us for cost in parts.values())
    assert list(parts) == ["other", PRODUCTS]  # the longest first


def test_the_default_s_operations_are_those_of_the_model():
    """27.7 GFLOP an image and the loss's; the attention's backward computes the scores again."""
    flops = total(committed(DEFAULT)["kernels"], GPUS["H200"]).flops
    assert flops / 64 / 27.7e9 == pytest.approx(1, abs=0.02)


def test_names_to_categories():
    assert triton_category("triton_poi_fused__to_copy_3", False) == "weight casts fp32 to bf16"
    assert triton_category("triton_poi_fused__to_copy_3", True) == "gradient casts bf16 to fp32"
    assert triton_category("triton_poi_fused__to_copy_view_4", True) == "activation gradient casts fp32 to bf16"
    assert triton_category("triton_per_fused_add_native_layer_norm_4", False) == "layer norm forward (+ residual)"
    assert triton_category("triton_red_fused_sum_5", True) == "bias gradients"
    assert extern_category("extern_kernels.addmm") == PRODUCTS
    assert extern_category("_scaled_mm.default") == FP8_PRODUCTS and extern_category("sort.default") == "other"
    assert eager_category("aten._foreach_norm.Scalar", 100, 8e7) == "gradient norm"


CODE = '''
triton_poi_fused_add_0 = async_compile.triton("triton_poi_fused_add_0", """'kernel_num_gb': 0.002,""")
triton_poi_fused_1 = async_compile.triton("triton_poi_fused_1", """no size""")

def call(args):
    assert_size_stride(x, (8, 8), (8, 1))
    # extern_kernels.mm(in a comment)
    triton_poi_fused_add_0.run(x, 64, stream=stream0)
    extern_kernels.mm(x, y, out=buf0)
    triton_poi_fused_1.run(x, 64, stream=stream0)
    triton_poi_fused_add_0.run(y, 64, stream=stream0)
'''
NODES = [
    dict(kernel=None, bytes=2e6, flops=None, inputs=[], outputs=[[8, 8]]),
    dict(kernel="extern_kernels.mm", bytes=3e6, flops=1024, inputs=[[8, 8], [8, 8]], outputs=[[8, 8]]),
    dict(kernel=None, bytes=6e6, flops=None, inputs=[], outputs=[[8, 8]]),
]


def test_kernels_of_generated_code():
    kernels = kernels_of_graph(CODE, NODES, "forward 0", False)
    assert [kernel["bytes"] for kernel in kernels] == [2e6, 3e6, 11e6 - 7e6, 2e6]
    assert [kernel["flops"] for kernel in kernels] == [0, 1024, 0, 0]
    with pytest.raises(ValueError, match="1 scheduled kernels are not in the generated code"):
        kernels_of_graph(CODE.replace("extern_kernels.mm(x, y", "other(x, y"), NODES, "forward 0", False)
    with pytest.raises(ValueError, match="no scheduled node for: extern_kernels.mm"):
        kernels_of_graph(CODE, NODES[:1], "forward 0", False)


def test_lists_are_written_and_read_back(tmp_path):
    sizes = {**SIZES, "slots": 10}
    one = {name: value for name, value in kernel(bytes=5.4).items() if name != "count"}
    path = kernel_list.write(tmp_path, "+ row", sizes, [one, one, {**one, "flops": 7}], "2.12")
    content = kernel_list.read(path)
    assert [(k["count"], k["bytes"], k["flops"]) for k in content["kernels"]] == [(2, 5, 0), (1, 5, 7)]
    assert content["command"].endswith(
        '"+ row" --model deit_small_patch16_224 --input-size 224 --batch-size 64 --slots 10'
    )
    path.write_text(json.dumps({**content, "kernels": [{"name": "x"}]}))
    with pytest.raises(ValueError, match="row-batch-64.*: not a list of kernels .lacks bytes, category"):
        kernel_list.read(path)
    with pytest.raises(ValueError, match="no lists of kernels"):
        kernel_list.read_all(tmp_path / "none")


def test_the_counts_of_ranks_take_less_than_50_ms_for_sop():
    """Its tile and its instructions for each threshold are those of the kernel."""
    parts = counts.milliseconds(*counts.SIZES)
    assert parts["products"] == pytest.approx(3 * 2 * 60544**2 * 384 / (0.75 * 790e12) * 1e3, rel=1e-4)
    assert max(parts["products"] + parts["comparisons"], parts["loads from L2"]) < parts["total"] < 50
    more = counts.milliseconds(60502, 60502, 384, 13)  # in two passes, each for 8 thresholds
    assert more["products"] == 2 * parts["products"] and more["comparisons"] < 1.4 * parts["comparisons"]
    tile = TILES[90]
    assert (tile.bm, tile.bn, SLICE, MOST_THRESHOLDS) == (
        counts.TILE, counts.TILE, counts.SLICE, counts.MOST_THRESHOLDS
    )  # fmt: skip
    (instructions,) = (each for name, each in CEILINGS.items() if name.startswith("count 12 sm_90"))
    assert 4 <= instructions / 12 < 5


def test_the_part_and_its_report(tmp_path, capsys):
    out = tmp_path / "predicted.jsonl"
    flags = ["--only", DEFAULT, "--gpu", "H200", "A100", "--kernels", "--device", "cpu"]
    assert main(["predict", *flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"H200: {MODEL}" in printed and "[matrix products] extern_kernels.mm" in printed
    rows = read([out])
    assert split_modelled(rows) == ([], rows)  # all are marked as a model's, and nothing was measured
    on_h200 = [row for row in rows if row["params"]["gpu"] == "H200" and row["params"]["batch_size"] == 64]
    assert [row["extra"]["launches"] for row in on_h200] == [EXPECTED[DEFAULT][0]]
    text = table(rows)
    assert text.startswith("## Model, not measured") and "measured / predicted" not in text
    assert "**predict** (A100;" in text and "| + CUDA graph, batch 64 | 680 |" in text


def test_the_report_divides_measured_by_predicted(tmp_path):
    assert main(["predict", "--only", DEFAULT, "--device", "cpu", "--out", str(tmp_path / "rows")]) == 0
    rows = read([tmp_path / "rows"])
    predicted = next(r for r in rows if r["params"]["gpu"] == "H200" and r["params"]["batch_size"] == 64)
    params = {name: value for name, value in predicted["params"].items() if name != "gpu"}
    ms = predicted["extra"]["categories"]["matrix products"]["ms"]
    rate = predicted["p50"] / 1.25
    measured = {**predicted, "part": "step", "name": DEFAULT, "device": "NVIDIA H200", "params": params}
    measured |= dict(p20=rate, p50=rate, p80=rate, extra={"us_by_category": {"matrix products": 1500 * ms}})
    text = table([*rows, measured]).split("## Model, not measured")[1]
    on = {gpu: text.split(f"**predict** ({gpu};")[1].split("**predict**")[0] for gpu in ("H200", "A100")}
    assert f"| {rate:,.0f} | 1.25 |" in on["H200"]
    assert f"| matrix products | {ms:.2f} (measured / predicted 1.50) |" in on["H200"]
    assert "measured /" not in on["A100"]
    smaller = {**measured, "params": {**params, "batch_size": 32}}
    assert "measured /" not in table([*rows, smaller])


def test_a_profile_s_kernels_by_category():
    sizes = {**SIZES, "slots": 59551}
    profile = {"triton_poi_fused__to_copy_7": 48.0, "nvjet_tst_128x256_64x4": 100.0, "stats_kernel": 9.0, "Memset": 1.0}
    profile |= {"void flash_fwd_kernel<...>": 7.0, "void flash_bwd_dot_do_o_kernel<...>": 2.0}
    found = us_by_category(profile, DEFAULT, sizes)
    casts = found.pop("weight casts fp32 to bf16"), found.pop("gradient casts bf16 to fp32")
    assert sum(casts) == 48 and all(casts)  # forward and backward have a kernel of that name
    assert found == {
        PRODUCTS: 100, "loss": 9, ATTENTION: 7, "attention backward": 2, "small eager operators": 1
    }  # fmt: skip
    assert us_by_category(profile, DEFAULT, {**sizes, "slots": 5}) == {}


def test_a_row_without_a_list_is_named(capsys):
    assert main(["predict", "--only", "eager fp32", "--device", "cpu", "--no-save"]) == 0
    assert "eager fp32                 not run: no list of its kernels" in capsys.readouterr().out
