"""Reads the code that TorchInductor generates: operators, and copies that only change a layout.

Nothing is run or compiled here; `generated_kernels` compiles.
"""

from __future__ import annotations

import ast
import re
from collections import Counter

# What may be called beside Triton kernels: products, convolution, attention, the project's loss.
# What Inductor cannot lower it calls as torch.ops.aten, a fallback.
OPERATORS = {
    "extern_kernels.addmm",
    "extern_kernels.convolution",
    "extern_kernels.mm",
    "torch.ops.aten._scaled_dot_product_flash_attention.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward.default",
    "torch.ops.aten.convolution_backward.default",
    "torch.ops.fastirt.contrastive_koleo.default",
    "torch.ops.fastirt.contrastive_koleo_backward.default",
}
ATTENTION = re.compile(r"torch\.ops\.aten\._scaled_dot_product_flash_attention\.default\((.*)\)")
VIEW = re.compile(r"reinterpret_tensor\((\w+), \([\d, ]+\), \([\d, ]+\), \d+\)")
PASSED_ON = re.compile(r"(tmp\d+) = (?:(tmp\d+)\.to\(.*\)|tl\.where\(.*?, (tmp\d+), (tmp\d+)\))$")


def launched(code: str) -> list[str]:
    """The lines of the function that launches the kernels."""
    marker = "def call(self, args)" if "def call(self, args)" in code else "\ndef call(args)"
    body = code[code.rindex(marker) :].split("\nrunner = ")[0]
    return [line.strip() for line in body.splitlines() if not line.strip().startswith(("#", "assert_"))]


def sources(code: str) -> dict[str, str]:
    """The source of each Triton kernel, by name."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "triton":
            name, source, *_ = (getattr(argument, "value", None) for argument in node.args)
            found[str(name)] = str(source)
    return found


def unexpected_operators(code: str) -> list[str]:
    called = Counter(re.findall(r"(?:extern_kernels|torch\.ops)\.[\w.]+(?=\()", "\n".join(launched(code))))
    return [f"{name} is called {count} times" for name, count in called.items() if name not in OPERATORS]


def layout_copies(code: str) -> Counter[str]:
    """Launches, by name, of kernels that move elements to other places and compute nothing."""
    copies = {name for name, source in sources(code).items() if _only_moves(source)}
    runs = re.findall(r"^(triton_\w+)\.run\(", "\n".join(launched(code)), re.MULTILINE)
    return Counter(name for name in runs if name in copies)


def _only_moves(source: str) -> bool:
    """Whether a kernel stores what it has loaded, at most cast, and some of it in another place.

    So a cast of weights to bf16 does not count.
    """
    body = source[source.index("\ndef triton_") :]
    origin: dict[str, set[str]] = {}  # value to the addresses that it may come from
    moved = False
    for line in map(str.strip, body.splitlines()):
        if load := re.match(r"(tmp\d+) = tl\.load\(\w+ \+ (.*)", line):
            origin[load[1]] = {_first(load[2])}
        elif constant := re.match(r"(tmp\d+) = tl\.full\(", line):
            origin[constant[1]] = set()
        elif (passed := PASSED_ON.match(line)) and all(name in origin for name in passed.groups()[1:] if name):
            origin[passed[1]] = set().union(*(origin[name] for name in passed.groups()[1:] if name))
        elif store := re.match(r"tl\.store\(\w+ \+ (.*)", line):
            value = re.search(r", (tmp\d+), ", store[1])
            if value is None or value[1] not in origin:
                return False
            moved |= bool(origin[value[1]] - {_first(store[1])})
    return moved


def _first(text: str) -> str:
    """The first parenthesis of a text, with what is in it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1]
    return text


def copied_inputs(code: str) -> list[str]:
    """Attention must read q, k and v where their product has put them, and the convolution the
    images where the step has put them."""
    faults, lines = [], launched(code)
    products = {found for line in lines for found in re.findall(r"extern_kernels\.(?:addmm|mm)\(.*out=(\w+)\)", line)}
    for line in lines:
        if called := ATTENTION.search(line):
            read = VIEW.findall(called[1])
            if len(read) != 3 or len(set(read)) != 1 or read[0] not in products:
                faults.append(f"attention does not read views of one product: {line[:300]}")
        if called := re.search(r"extern_kernels\.convolution\((\w+)", line):
            if not called[1].startswith(("primals_", "arg")):
                faults.append(f"the convolution reads {called[1]}, a copy of the images: {line[:300]}")
    return faults
