"""Flags that make each part small, and what a small part must report."""

QUICK = "--quick --device cpu --repeats 2".split()


LIMITS = {"GB/s": 10.0, "bf16": 0.1, "tf32": 0.1, "fp32": 0.1}


# Flags that make a part small, and the contenders that a CPU has.
SMALL = {
    "loss": ("--rows 16 --slots 50 --dim 32 --dtype fp32", {"fastirt", "plain", "compiled", "metric-learning"}),
    "cache": ("--images 20 --side 40 --crop 32", {"fastirt, host", "torch indexing"}),
    "input": (
        "--images 48 --batches 1 --workers 2",
        {
            "decode alone",
            "decode alone, packed",
            "fastirt files",
            "fastirt files, DALI",
            "fastirt files, PIL",
            "fastirt packed",
        }
        | {"public recipe", "torchvision v2"},
    ),
    "step": ("--input-size 32 --only", {"eager fp32", "onednn fp32", "public recipe", "compile fp32"}),
    "attention": (
        "--tokens 20 --heads 2 --dim 8",
        {"torch's choice", "flash", "math", "padded to 200", "padded to 256"},
    ),
    "products": (
        "--tokens 20 --dim 8",
        {
            f"{layer}, {product}"
            for layer in ("qkv", "projection", "fc1", "fc2")
            for product in ("forward", "gradient of input", "gradient of weight")
        },
    ),
    "train": ("--steps 6 --images 24", {"fastirt", "fastirt, onednn", "fastirt, no cache", "public recipe"}),
    "embed": (
        "--images 8 --workers 1 --model vit_tiny_patch16_224 --model-kwargs depth=1",
        {"encoder alone", "fastirt embed", "fastirt embed, onednn", "fastirt evaluation"}
        | {"timm inference", "open_clip-style loop"},
    ),
    "retrieval": (
        "--queries 200 --dim 16 --k 5 --sets cub200",
        {
            "fastirt",
            "fastirt, all metrics",
            "fastirt (FAISS)",
            "torch product + topk",
            "FAISS IndexFlatIP",
            "metric-learning",
            "bare product",
        },
    ),
    "gallery": (
        "--vectors 300 --dim 16 --queries 1 --kinds HNSW4",
        {"build exact", "build HNSW4", "open", "open and verify", "read of all vectors"}
        | {"fastirt", "fastirt, one brand", "fastirt HNSW4"}
        | {"FAISS IndexFlatIP", "torch product + topk", "numpy product + topk"},
    ),
    "scaling": (
        "--step-ms 4",
        {"memory whole, alone", "memory whole, gloo", "memory sharded, gloo"}
        | {f"model (not measured), memory {layout}" for layout in ("whole", "sharded")},
    ),
}
