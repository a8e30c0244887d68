"""A profiled step's time by the categories of the model. Standard library only.

Triton's kernels are looked up in the row's list. Those of libraries are known by parts of their
names, as torch 2.12, cuBLAS and cuDNN give them; no GPU has confirmed the names yet.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from benchmarks.predict import kernel_list
from benchmarks.predict.categories import (
    ATTENTION,
    ATTENTION_BACKWARD,
    INPUT,
    LOSS,
    PATCHES,
    PRODUCTS,
    triton_category,
)

# The first pattern that a name contains decides.
LIBRARIES = (
    (r"^gather_kernel", INPUT),
    (r"^(stats|rows|totals|grad|combine)_kernel", LOSS),
    (r"(flash|fmha|sdpa|attention).*(bwd|backward|dot_do_o|convert_dq)", ATTENTION_BACKWARD),
    (r"flash|fmha|sdpa|attention", ATTENTION),
    (r"fused_?adam", "AdamW"),
    (r"lpnorm", "gradient norm"),
    (r"multi_tensor_apply.*copy", "bf16 copies of weights and gradients"),
    (r"multi_tensor_apply", "momentum encoder"),
    (r"fprop|wgrad|dgrad|implicit_gemm|convolve", PATCHES),
    (r"gemm|nvjet|cutlass|cublas|splitk", PRODUCTS),
)


def us_by_category(kernel_us: dict[str, float], row: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Microseconds of one step by category.

    {} without kernels, as on a CPU, and without a list of `row` at these sizes.

    kernel_us: by the kernel's name. A name that the list has in two categories, such as a cast of
    equal shape forward and backward, is divided by the bytes that each moves.
    """
    content = kernel_list.find(row, sizes) if kernel_us else None
    if content is None:
        return {}
    moved: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kernel in content["kernels"]:
        moved[kernel["name"]][kernel["category"]] += kernel["count"] * max(1, kernel["bytes"])
    found: dict[str, float] = defaultdict(float)
    for name, us in kernel_us.items():
        shares = moved[name] if name in moved else {category_of(name): 1.0}
        for category, share in shares.items():
            found[category] += us * share / sum(shares.values())
    return dict(found)


def category_of(name: str) -> str:
    """Of a kernel that the list does not have by its name."""
    if name.startswith("triton_"):
        return triton_category(name, "backward" in name)
    for pattern, category in LIBRARIES:
        if re.search(pattern, name, re.IGNORECASE):
            return category
    return "small eager operators"
