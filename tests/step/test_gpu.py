"""What only a GPU can say; skipped where there is none."""

import time

import numpy as np
import pytest
import torch
from torch.nn.attention import sdpa_kernel

from benchmarks.contenders.model_variants import BACKENDS
from fastirt.datasets import load_dataset
from fastirt.loading.eval_loader import EvalLoader
from fastirt.retrieval.positives import RowLists
from fastirt.retrieval.ranks import positive_ranks
from fastirt.retrieval.search import search
from fastirt.step.train_step import PHASES
from fastirt.training.throughput import InputWait
from tests.helpers import (
    DECODER,
    ROOT,
    loss_rows,
    make_batch,
    make_step,
    needs_dali,
    needs_gpu,
    no_waiting,
    run_cli,
    run_steps,
    tiny_config,
    tiny_input,
    tiny_loader,
    train_tiny,
)

pytestmark = needs_gpu
GPU = torch.device("cuda:0")


@needs_dali
def test_mixed_decoding_agrees_with_pil(image_folder):
    """nvJPEG's inverse transform rounds otherwise than libjpeg's: only the mean is pinned."""
    catalog = load_dataset("folder", str(image_folder))
    batches = {}
    for decoder in ("dali", "pil"):
        loader = tiny_loader(catalog, GPU, batch_size=32, m=4, max_iter=20, num_workers=4, loader=decoder)
        batches[decoder] = [(b.indices.tolist(), b.images.cpu().int()) for b in loader]
    for ours, plain in zip(batches["dali"], batches["pil"], strict=True):
        assert ours[0] == plain[0] and (ours[1] - plain[1]).abs().float().mean() < 1


def test_batches_are_complete_when_they_arrive(image_folder):
    split = load_dataset("folder", str(image_folder)).query
    config = tiny_input(num_workers=4, loader=DECODER)
    runs = [
        torch.cat([b.images[: b.valid].clone() for b in EvalLoader(split, batch_size=8, input=config, device=GPU)])
        for _ in range(3)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "engine, precision", [("eager", "fp32"), ("eager", "bf16"), ("compile", "bf16"), ("graph", "bf16-weights")]
)
def test_the_step_never_waits_for_the_gpu(engine, precision):
    config = tiny_config(
        precision=precision, engine=engine, encoder_momentum=0.9, clip_grad=1.0, drop_path=0.2, drop=0.1
    )
    step = make_step(config, device=GPU)
    batches = [make_batch(number, device=GPU) for number in range(8)]
    for batch in batches[:5]:
        step(batch)
    with no_waiting():
        for batch in batches[5:]:
            step(batch)
    assert step.counters.first_bad_step.item() == -1


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_own_parts_train_as_on_a_cpu_and_never_wait(engine):
    examples = ROOT / "scripts/examples"
    own = dict(
        augment=f"{examples}/own_augmentation.py:jitter", objective=f"{examples}/own_loss.py:supervised_contrastive"
    )
    steps = [
        make_step(tiny_config(precision="fp32", engine=e, **own), device=d)
        for e, d in (("eager", "cpu"), (engine, GPU))
    ]
    curves = [run_steps(step, 0, 6, step.device) for step in steps]
    torch.testing.assert_close(curves[1].cpu(), curves[0], rtol=1e-2, atol=1e-3)  # a pixel may round otherwise
    batches = [make_batch(number, device=GPU) for number in range(6, 9)]
    with no_waiting():
        for batch in batches:
            steps[1](batch)


@pytest.mark.parametrize("k", [5, 2500])
def test_search_on_the_gpu_agrees_with_the_cpu(k):
    vectors = torch.nn.functional.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[100:200] = vectors[0]
    on_cpu, on_gpu = (
        np.concatenate([i.numpy() for _, _, i in search(vectors[:300], vectors, k, device=device)])
        for device in ("cpu", GPU)
    )
    assert (on_cpu == on_gpu).mean() > 0.999  # near-ties may be rounded differently


@pytest.mark.parametrize("backend", ["ranks", "faiss", "torch"])
def test_ranks_on_the_gpu_are_those_of_the_cpu(backend):
    vectors = torch.nn.functional.normalize(torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[100:200] = vectors[0]
    positives = RowLists.of_labels(torch.arange(3000) % 150, torch.arange(3000) % 150)
    own = RowLists.of_column(torch.arange(3000))
    on_cpu = positive_ranks(vectors, vectors, positives, own)
    on_gpu = positive_ranks(vectors, vectors, positives, own, backend=backend, device=GPU)
    assert torch.equal(on_gpu.ranks, on_cpu.ranks) and torch.equal(on_gpu.rows, on_cpu.rows)


@pytest.mark.parametrize("tokens", [37, 197])
def test_gradients_of_cudnn_and_flash_attention_agree(tokens):
    """torch's choice is cuDNN's on Hopper. Neither gives NaN at a length that fills no tile."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(8, 6, tokens, 64, generator=generator).to(GPU, torch.bfloat16) for _ in range(4)]
    *inputs, upstream = made
    gradients = {}
    for name in ("flash", "cuDNN", "math"):
        leaves = [value.clone().requires_grad_() for value in inputs]
        with sdpa_kernel(BACKENDS[name]):
            attended = torch.nn.functional.scaled_dot_product_attention(*leaves)
        gradients[name] = torch.stack(torch.autograd.grad(attended, leaves, upstream)).float()
    for name in ("flash", "cuDNN"):
        apart = (gradients[name] - gradients["math"]).norm() / gradients["math"].norm()
        assert apart < 0.02, (name, apart)


def test_a_run_on_the_gpu(image_folder, tmp_path):
    flags = "--max-iter 20 --batch-size 16 --logging-freq 3 --save-freq 7 --eval-freq 10"
    assert train_tiny(image_folder, tmp_path / "run", "--device", "cuda:0", *flags.split()) == 0
    assert run_cli("evaluate", tmp_path / "run", "--device", "cpu", "--output-dir", tmp_path / "cpu") == 0


def gpu_run(image_folder, out, *flags):
    few = "--device cuda:0 --batch-size 16 --logging-freq 4 --rank 1 --encoder-momentum 0.9"
    return train_tiny(image_folder, out, *few.split(), *flags)


@pytest.mark.parametrize("engine", ["eager", "compile", "graph"])
def test_every_engine_trains_profiles_and_resumes(image_folder, tmp_path, engine, caplog):
    with caplog.at_level("INFO", logger="fastirt"):
        assert gpu_run(image_folder, tmp_path, "--engine", engine, "--max-iter", "24", "--profile", "2") == 0
    assert (tmp_path / "trace.json").exists()
    said = [r.getMessage().removeprefix("profile: ") for r in caplog.records if r.getMessage().startswith("profile")]
    spent = {line[:10].strip(): float(line[10:].split()[0]) for line in said[1:-1]}
    assert list(spent) == ["input wait", *PHASES, "other"] and spent["backward"] > 0
    assert gpu_run(image_folder, tmp_path, "--engine", engine, "--max-iter", "30", "--resume") == 0


def test_images_in_the_hosts_memory_are_the_same(image_folder, tmp_path):
    """Page-locked memory read across the bus, under the captured step."""
    losses = []
    for cache in ("host", "device", "none"):
        flags = f"--cache {cache} --max-iter 20 --precision fp32 --logging-freq 1"
        assert gpu_run(image_folder, tmp_path / cache, *flags.split()) == 0
        losses.append([row["loss"] for row in loss_rows(tmp_path / cache)])
    for other in losses[1:]:  # after the first step, atomics in the backward may round differently
        assert other[0] == losses[0][0] and other == pytest.approx(losses[0], rel=1e-3)


def test_input_wait_is_the_devices():
    """A loader that takes as long as the device works costs nothing; one that takes longer costs
    the difference."""

    def busy(milliseconds):
        torch.cuda._sleep(int(milliseconds * 1.5e6))

    def slow(seconds):
        for number in range(10):
            time.sleep(seconds)
            yield number

    found = []
    for seconds in (0.002, 0.05):
        waiting = InputWait(GPU)
        for _ in waiting.follow(slow(seconds)):
            busy(10)
        torch.cuda.synchronize()
        found.append(waiting.read())
    assert found[0] < 0.02 and found[1] > 0.2, found
