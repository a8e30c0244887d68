"""The code that TorchInductor generates for a training step on an H200."""

import re

import pytest

from tests.fake_cuda.generated_code import copied_inputs, layout_copies, sources, unexpected_operators
from tests.fake_cuda.processes import no_gpu, on_fake_gpu, selected

# A product, attention on its views, a copy of a layout, a cast in place, an addition.
CODE = '''
triton_poi_fused_clone_0 = async_compile.triton("triton_poi_fused_clone_0", """
def triton_poi_fused_clone_0(in_ptr0, out_ptr0, xnumel):
    tmp0 = x5
    tmp1 = tl.full([1], 64, tl.int64)
    tmp2 = tmp0 < tmp1
    tmp3 = tl.load(in_ptr0 + (x4 + 75648*(x2 + 64*x3)), tmp2, other=0.0).to(tl.float32)
    tmp4 = tl.full(tmp3.shape, 0.0, tmp3.dtype)
    tmp5 = tl.where(tmp2, tmp3, tmp4)
    tl.store(out_ptr0 + (x0 + 384*x3), tmp5, None)
""")
triton_poi_fused__to_copy_1 = async_compile.triton("triton_poi_fused__to_copy_1", """
def triton_poi_fused__to_copy_1(in_ptr0, out_ptr0, xnumel):
    tmp0 = tl.load(in_ptr0 + (x0), xmask)
    tmp1 = tmp0.to(tl.float32)
    tl.store(out_ptr0 + (x0), tmp1, xmask)
""")
triton_poi_fused_add_2 = async_compile.triton("triton_poi_fused_add_2", """
def triton_poi_fused_add_2(in_ptr0, out_ptr0, xnumel):
    tmp0 = tl.load(in_ptr0 + (x1), xmask)
    tmp1 = tmp0 + tmp0
    tl.store(out_ptr0 + (x0), tmp1, xmask)
""")

def call(args):
    # torch.ops.aten.sort.default(in a comment)
    triton_poi_fused_clone_0.run(primals_1, buf0, 64, stream=raw_stream0)
    triton_poi_fused__to_copy_1.run(primals_1, buf1, 64, stream=raw_stream0)
    triton_poi_fused_add_2.run(primals_1, buf2, 64, stream=raw_stream0)
    buf3 = extern_kernels.convolution(primals_1, buf0, stride=(16, 16))
    extern_kernels.addmm(buf10, buf8, reinterpret_tensor(buf9, (384, 1152), (1, 384), 0), alpha=1, beta=1, out=buf11)
    buf12 = torch.ops.aten._scaled_dot_product_flash_attention.default(reinterpret_tensor(buf11, (64, 6), (9, 1), 0), \
reinterpret_tensor(buf11, (64, 6), (9, 1), 384), reinterpret_tensor(buf11, (64, 6), (9, 1), 768), scale=0.125)

runner = Runner(partitions=[])
'''


def test_copies_fallbacks_and_copied_inputs_are_found_in_code():
    assert list(sources(CODE)) == ["triton_poi_fused_clone_0", "triton_poi_fused__to_copy_1", "triton_poi_fused_add_2"]
    assert layout_copies(CODE) == {"triton_poi_fused_clone_0": 1}
    assert unexpected_operators(CODE) == copied_inputs(CODE) == []
    sorted_too = CODE.replace("    buf3 =", "    buf4 = torch.ops.aten.sort.default(buf1)\n    buf3 =")
    assert unexpected_operators(sorted_too) == ["torch.ops.aten.sort.default is called 1 times"]
    (fault,) = copied_inputs(CODE.replace("convolution(primals_1", "convolution(buf5"))
    assert "the convolution reads buf5" in fault
    copied = CODE.replace("reinterpret_tensor(buf11, (64, 6), (9, 1), 768)", "buf13")
    for code in (copied, CODE.replace("out=buf11", "out=buf14")):
        (fault,) = copied_inputs(code)
        assert "attention does not read views of one product" in fault


@pytest.fixture(scope="module")
def proofs(request):
    """Faults by case."""
    return dict(on_fake_gpu("generated_proof", *selected(request, "case"), timeout=900))


@no_gpu
@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(
    "case",
    ["default", *(pytest.param(case, marks=pytest.mark.sweep) for case in ("bf16 weights", "momentum encoder"))],
)
def test_the_generated_code_has_the_known_kernels_and_none_that_copies_a_layout_or_spills(case, proofs):
    assert proofs[case] == []


@no_gpu
@pytest.mark.sweep
@pytest.mark.compile
@pytest.mark.parametrize("case", ["planted: NCHW images"])
def test_a_copy_of_the_images_is_noticed(case, proofs):
    launches, convolution, copy = proofs[case]
    more, committed = map(int, re.match(r"(\d+) launches, (\d+) in cuda-graph-batch-64", launches).groups())
    assert more == committed + 1
    assert convolution.startswith("forward 0: the convolution reads buf")
    assert copy.startswith("forward 0: triton_poi_fused_") and copy.endswith("only changes a layout, 1 times")


@no_gpu
@pytest.mark.sweep
@pytest.mark.compile
@pytest.mark.parametrize("case", ["planted: combined kernels"])
def test_kernels_that_spill_are_noticed(case, proofs):
    spilling = {fault.split()[0] for fault in proofs[case] if "spills: " in fault}
    assert len(spilling) == 4 and all(name.startswith("triton_red_fused_") for name in spilling)
