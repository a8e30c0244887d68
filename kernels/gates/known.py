"""Accepted findings of the gates, and how many instructions each kernel takes.

`python -m fastirt.kernels.aot --tables` prints both tables anew, after a change of a kernel or of a
tile. A finding that is not listed is a fault, and so is an entry that no kernel needs.
"""

from __future__ import annotations

REASONS = {
    "wait": "two stages have no copy under way during the products; three do not fit, or not on each GPU of the row, "
    "or were not tried (fp32). On sm_100 labels decide what to load, since the other loop was worse there",
    "warps": "eight warps cover 128 rows (wgmma) or 64 columns (mma.sync), and four cover 64 rows; four spill a whole "
    "gradient, and of slices of D each computes all similarities. Two warps for 32 rows were not tried",
    "bytes": "the bytes of words that reach beyond the storage; the cache has none",
}
# (gate, kernel, compute capability): tiles, rows x columns x part of D, w warps, s stages
EXCEPTIONS = {
    ("bytes", "gather edges", 80): "-",
    ("bytes", "gather edges", 90): "-",
    ("bytes", "gather edges", 100): "-",
    ("wait", "grad", 80): "32x32x128w8s2 64x32x128w8s2 32x16x64w8s2 16x16x64w4s2 32x32x64w8s2",
    ("wait", "grad", 90): "64x16x64w8s2 32x16x64w8s2 32x32x64w8s2",
    ("wait", "grad", 100): "32x32x128w8s2 64x32x128w8s2 32x16x64w8s2 64x16x64w8s2 32x32x64w8s2",
    ("wait", "stats", 80): "128x64x64w8s2 64x16x128w4s2 64x32x128w4s2 32x16x64w4s2 16x16x64w4s2 32x32x64w8s2",
    ("wait", "stats", 90): "128x64x64w8s2 64x16x128w4s2 64x32x128w4s2 32x16x64w4s2 32x32x64w8s2",
    ("wait", "stats", 100): "64x32x128w4s2 32x16x64w4s2 32x32x64w8s2",
    ("warps", "grad", 80): "32x32x128w8s2 64x32x128w8s2 32x16x64w8s2 64x32x128w8s3 16x16x64w4s2",
    ("warps", "grad", 90): "64x64x128w8s3 64x32x128w8s3 64x16x64w8s2 64x16x64w8s3 32x16x64w8s2 32x32x128w8s3",
    ("warps", "grad", 100): "32x32x128w8s2 32x16x64w8s2",
    ("warps", "stats", 80): "32x16x64w4s2 16x16x64w4s2",
    ("warps", "stats", 90): "32x16x64w4s2",
    ("warps", "stats", 100): "32x16x64w4s2",
}

# Instructions each; more than MARGIN times as many are a fault.
MARGIN = 1.03
CEILINGS = {
    "stats sm_80 bf16 D=384 64x64x128w4s3": 61.0,
    "stats sm_80 bf16 D=384 128x64x64w8s2": 51.5,
    "stats sm_80 bf16 D=768 64x16x128w4s2": 67.4,
    "stats sm_80 bf16 D=1024 64x16x128w4s2": 76.1,
    "grad sm_80 bf16 D=384 64x64x128w8s3": 50.6,
    "grad sm_80 bf16 D=768 32x32x128w8s2": 282.2,
    "grad sm_80 bf16 D=1024 32x32x128w8s2": 147.8,
    "stats sm_80 mixed D=384 64x32x128w4s2": 77.4,
    "stats sm_80 mixed D=1024 32x16x64w4s2": 269.2,
    "grad sm_80 mixed D=384 64x32x128w8s2": 108.0,
    "grad sm_80 mixed D=768 32x16x64w8s2": 320.0,
    "grad sm_80 mixed D=1024 32x16x64w8s2": 410.0,
    "stats sm_80 tf32 D=384 64x32x128w4s2": 72.0,
    "stats sm_80 tf32 D=1024 16x16x64w4s2": 449.5,
    "grad sm_80 tf32 D=384 64x32x128w8s3": 136.4,
    "grad sm_80 tf32 D=1024 16x16x64w4s2": 321.5,
    "stats sm_80 fp32 D=384 32x32x64w8s2": 555.8,
    "stats sm_80 fp32 D=1024 16x16x64w8s1": 1682.0,
    "grad sm_80 fp32 D=384 32x32x64w8s2": 766.2,
    "grad sm_80 fp32 D=1024 16x16x64w8s1": 1992.0,
    "gather sm_80 bf16 D=224": 7.4,
    "gather edges sm_80 bf16 D=224": 26.6,
    "stats sm_90 bf16 D=384 64x64x128w4s3": 61.3,
    "stats sm_90 bf16 D=384 128x64x64w8s2": 45.2,
    "stats sm_90 bf16 D=768 64x16x128w4s2": 79.5,
    "stats sm_90 bf16 D=1024 64x16x128w4s2": 93.4,
    "grad sm_90 bf16 D=384 64x64x128w8s3": 66.8,
    "grad sm_90 bf16 D=384 64x32x128w8s3": 123.8,
    "grad sm_90 bf16 D=768 64x16x64w8s2": 216.2,
    "grad sm_90 bf16 D=1024 64x16x64w8s2": 275.8,
    "stats sm_90 mixed D=384 64x32x128w4s2": 60.8,
    "stats sm_90 mixed D=1024 64x16x128w4s2": 106.4,
    "grad sm_90 mixed D=384 64x16x64w8s3": 120.2,
    "grad sm_90 mixed D=1024 32x16x64w8s2": 416.0,
    "stats sm_90 tf32 D=384 64x32x128w4s2": 77.0,
    "stats sm_90 tf32 D=1024 32x16x64w4s2": 226.8,
    "grad sm_90 tf32 D=384 32x32x128w8s3": 163.5,
    "grad sm_90 tf32 D=1024 32x16x64w8s2": 425.0,
    "stats sm_90 fp32 D=384 32x32x64w8s2": 556.5,
    "stats sm_90 fp32 D=1024 16x16x64w8s1": 1681.0,
    "grad sm_90 fp32 D=384 32x32x64w8s2": 766.8,
    "grad sm_90 fp32 D=1024 16x16x64w8s1": 1994.0,
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
