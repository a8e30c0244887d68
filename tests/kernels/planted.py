"""Kernels with a planted fault for each gate, compiled for sm_90; prints findings as JSON.

python -m tests.kernels.planted, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastirt.kernels.aot import _assemble
from fastirt.kernels.gates import judge
from fastirt.kernels.variants.jobs import Job
from fastirt.kernels.variants.tile_table import Tile


@triton.jit
def similarities(
    a_ptr, b_ptr, labels_ptr, out_ptr, n, last,
    BY_LABEL: tl.constexpr, CHAIN: tl.constexpr, EXTRA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Similarities of BM rows and n tiles of BN columns; CHAIN: and the sum of weighted columns."""
    row, d = tl.arange(0, BM), tl.arange(0, BD)
    a = tl.load(a_ptr + row[:, None] * BD + d[None, :])
    total = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM, BD), tl.float32)
    for tile in range(0, n):
        col = tile * BN + tl.arange(0, BN)
        label = tl.load(labels_ptr + col)
        if BY_LABEL:
            keep = label >= 0
        else:
            keep = col < last
        b = tl.load(b_ptr + col[:, None] * BD + d[None, :], mask=keep[:, None], other=0.0)
        s = tl.dot(a, tl.trans(b))
        if EXTRA:
            s = tl.sqrt(tl.exp(tl.sin(s)))
        total += tl.sum(tl.where(label[None, :] >= 0, s, 0.0), 1)
        if CHAIN:  # then Triton gives every warp whole rows
            weighted = tl.dot(s.to(tl.bfloat16), b, weighted)
    tl.store(out_ptr + row, total + tl.sum(weighted, 1))


@triton.jit
def copy_bytes(out_ptr, pixels_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) * 3
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(pixels_ptr + at).to(tl.int16))


def compile_it(kernel, types, constants, warps, stages=1) -> judge.Texts:
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    log, sass = _assemble(asm["ptx"], 90)
    return judge.Texts(asm["ttgir"], asm["ptx"], sass, log)


def pairs(warps=4, **flags) -> dict[str, str]:
    """Findings of `similarities` on a tile of 64 x 64."""
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "labels_ptr": "*i64", "out_ptr": "*fp32", "n": "i32", "last": "i32"}
    constants = dict(BY_LABEL=False, CHAIN=False, EXTRA=False, BM=64, BN=64, BD=64) | flags
    texts = compile_it(similarities, types, constants, warps, stages=3)
    job = Job("planted", 90, "bf16", 64, Tile(64, 64, 64, 4, 3))
    each = judge.instructions_each(job, texts.sass, 0)
    judge.CEILINGS.setdefault(judge.ceiling_key(job), each)  # of the first call
    return judge.findings(job, each, texts)


def main() -> None:
    found = {
        "clean": pairs(),
        "mask by label": pairs(BY_LABEL=True),
        "four warps": pairs(CHAIN=True),
        "eight warps": pairs(CHAIN=True, warps=8),
        "more work": pairs(EXTRA=True),
    }
    texts = compile_it(copy_bytes, {"out_ptr": "*i16", "pixels_ptr": "*u8"}, {"BLOCK": 256}, warps=4)
    found["bytes"] = judge.findings(Job("gather", 90, "bf16", 224), None, texts)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
