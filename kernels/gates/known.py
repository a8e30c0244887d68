"""Accepted findings of the gates, and how many instructions each kernel takes.

`python -m fastirt.kernels.aot --tables` prints both tables anew, after a change of a kernel or of a
tile. A finding that is not listed is a fault, and so is an entry that no kernel needs.
"""

from __future__ import annotations

REASONS = {
    "wait": "the mask of a load depends on labels loaded in the same turn, so that Triton fetches no tile ahead; "
    "two stages have nothing under way in any case, and three need up to 48 KiB more of shared memory",
    "warps": "eight warps cover 128 rows (wgmma) or 64 columns (mma.sync), and four cover 64 rows; four spill a whole "
    "gradient, and of slices of D each computes all similarities. Two warps for 32 rows were not tried",
    "bytes": "the bytes of words that reach beyond the storage; the cache has none",
}
# (gate, kernel, compute capability): tiles, rows x columns x part of D, w warps, s stages
EXCEPTIONS = {
    ("bytes", "gather edges", 80): "-",
    ("bytes", "gather edges", 90): "-",
    ("bytes", "gather edges", 100): "-",
    ("wait", "grad", 80): "64x64x128w8s2 32x32x128w8s2 64x32x128w8s2 32x16x64w8s2 16x16x64w4s2 32x32x64w8s2",
    ("wait", "grad", 90): "64x64x128w8s2 64x32x128w8s3 64x16x64w8s2 32x16x64w8s2 32x32x128w8s2 32x32x64w8s2",
    ("wait", "grad", 100): "32x32x128w8s2 64x32x128w8s2 32x16x64w8s2 64x16x64w8s2 32x32x64w8s2",
    ("wait", "stats", 80): """
        64x64x128w4s2 128x64x64w8s2 64x16x128w4s2 64x32x128w4s2 32x16x64w4s2 16x16x64w4s2
        32x32x64w8s2
    """,
    ("wait", "stats", 90): "64x64x128w4s2 128x64x64w8s3 64x16x128w4s2 64x32x128w4s2 32x16x64w4s2 32x32x64w8s2",
    ("wait", "stats", 100): "64x32x128w4s2 32x16x64w4s2 32x32x64w8s2",
    ("warps", "grad", 80): "32x32x128w8s2 64x32x128w8s2 32x16x64w8s2 16x16x64w4s2",
    ("warps", "grad", 90): "64x64x128w8s2 64x32x128w8s3 64x16x64w8s2 32x16x64w8s2 32x32x128w8s2",
    ("warps", "grad", 100): "32x32x128w8s2 32x16x64w8s2",
    ("warps", "stats", 80): "32x16x64w4s2 16x16x64w4s2",
    ("warps", "stats", 90): "32x16x64w4s2",
    ("warps", "stats", 100): "32x16x64w4s2",
}

# Instructions each; more than MARGIN times as many are a fault.
MARGIN = 1.03
CEILINGS = {
    "stats sm_80 bf16 D=384 64x64x128w4s2": 57.9,
    "stats sm_80 bf16 D=384 128x64x64w8s2": 50.8,
    "stats sm_80 bf16 D=768 64x16x128w4s2": 70.2,
    "stats sm_80 bf16 D=1024 64x16x128w4s2": 79.0,
    "grad sm_80 bf16 D=384 64x64x128w8s2": 50.8,
    "grad sm_80 bf16 D=768 32x32x128w8s2": 282.2,
    "grad sm_80 bf16 D=1024 32x32x128w8s2": 153.0,
    "stats sm_80 mixed D=384 64x32x128w4s2": 80.9,
    "stats sm_80 mixed D=1024 32x16x64w4s2": 274.5,
    "grad sm_80 mixed D=384 64x32x128w8s2": 111.9,
    "grad sm_80 mixed D=768 32x16x64w8s2": 323.5,
    "grad sm_80 mixed D=1024 32x16x64w8s2": 414.0,
    "stats sm_80 tf32 D=384 64x32x128w4s2": 72.0,
    "stats sm_80 tf32 D=1024 16x16x64w4s2": 462.5,
    "grad sm_80 tf32 D=384 64x32x128w8s2": 134.9,
    "grad sm_80 tf32 D=1024 16x16x64w4s2": 332.0,
    "stats sm_80 fp32 D=384 32x32x64w8s2": 563.2,
    "stats sm_80 fp32 D=1024 16x16x64w8s1": 1689.0,
    "grad sm_80 fp32 D=384 32x32x64w8s2": 772.5,
    "grad sm_80 fp32 D=1024 16x16x64w8s1": 1999.0,
    "gather sm_80 bf16 D=224": 7.4,
    "gather edges sm_80 bf16 D=224": 26.6,
    "stats sm_90 bf16 D=384 64x64x128w4s2": 54.5,
    "stats sm_90 bf16 D=384 128x64x64w8s3": 50.3,
    "stats sm_90 bf16 D=768 64x16x128w4s2": 80.9,
    "stats sm_90 bf16 D=1024 64x16x128w4s2": 92.1,
    "grad sm_90 bf16 D=384 64x64x128w8s2": 66.8,
    "grad sm_90 bf16 D=384 64x32x128w8s3": 123.8,
    "grad sm_90 bf16 D=768 64x16x64w8s2": 218.0,
    "grad sm_90 bf16 D=1024 64x16x64w8s2": 277.5,
    "stats sm_90 mixed D=384 64x32x128w4s2": 62.6,
    "stats sm_90 mixed D=1024 64x16x128w4s2": 109.6,
    "grad sm_90 mixed D=384 64x16x64w8s2": 119.5,
    "grad sm_90 mixed D=1024 32x16x64w8s2": 420.0,
    "stats sm_90 tf32 D=384 64x32x128w4s2": 77.0,
    "stats sm_90 tf32 D=1024 32x16x64w4s2": 228.2,
    "grad sm_90 tf32 D=384 32x32x128w8s2": 160.5,
    "grad sm_90 tf32 D=1024 32x16x64w8s2": 429.0,
    "stats sm_90 fp32 D=384 32x32x64w8s2": 563.0,
    "stats sm_90 fp32 D=1024 16x16x64w8s1": 1688.0,
    "grad sm_90 fp32 D=384 32x32x64w8s2": 772.5,
    "grad sm_90 fp32 D=1024 16x16x64w8s1": 1998.0,
    "gather sm_90 bf16 D=224": 7.6,
    "gather edges sm_90 bf16 D=224": 26.7,
    "stats sm_100 bf16 D=384 64x64x128w8s2": 36.4,
    "stats sm_100 bf16 D=768 64x16x128w4s2": 59.8,
    "stats sm_100 bf16 D=1024 64x16x128w4s2": 71.5,
    "grad sm_100 bf16 D=384 64x32x128w8s2": 98.8,
    "grad sm_100 bf16 D=768 32x32x128w8s2": 133.5,
    "grad sm_100 bf16 D=1024 32x32x128w8s2": 154.5,
    "stats sm_100 mixed D=384 64x32x128w4s2": 48.1,
    "stats sm_100 mixed D=1024 32x16x64w4s2": 274.0,
    "grad sm_100 mixed D=384 64x32x128w8s2": 112.8,
    "grad sm_100 mixed D=1024 32x16x64w8s2": 416.5,
    "stats sm_100 tf32 D=384 64x32x128w4s2": 36.3,
    "stats sm_100 tf32 D=1024 32x16x64w4s2": 229.8,
    "grad sm_100 tf32 D=384 64x16x64w8s2": 198.2,
    "grad sm_100 tf32 D=1024 32x16x64w8s2": 426.0,
    "stats sm_100 fp32 D=384 32x32x64w8s2": 697.8,
    "stats sm_100 fp32 D=1024 16x16x64w8s1": 1688.0,
    "grad sm_100 fp32 D=384 32x32x64w8s2": 809.5,
    "grad sm_100 fp32 D=1024 16x16x64w8s1": 1884.0,
    "gather sm_100 bf16 D=224": 7.6,
    "gather edges sm_100 bf16 D=224": 27.6,
}
