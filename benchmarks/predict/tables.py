"""The report's tables of predicted steps, beside what a GPU has measured. Standard library only."""

from __future__ import annotations

from typing import Any

NOTE = (
    "Arithmetic on lists of kernels: `benchmarks/predict/model.py` states the assumptions. "
    "It is a best case: expect 10-25 % less. Launches from the host, which rows without a CUDA graph "
    "wait for, cost nothing here. The kernels are those that torch.compile generates for an H200, and the "
    "shares of bandwidth and peak that they reach are an H200's; for attention on an A100 they are probably too low."
)
SIZES = ("model", "input_size", "batch_size", "slots")
Row = dict[str, Any]


def tables(predicted: list[Row], measured: list[Row], prefix: str) -> str:
    """Markdown: the steps on each GPU, then their milliseconds by category, folded.

    predicted, measured: rows of results files. prefix: what the predicted rows' names start with.
    A measured row is that of the part `step` with the same name and sizes on that GPU; its
    `extra["us_by_category"]`, where it has one, is compared category by category.
    """
    blocks = [NOTE]
    for gpu in dict.fromkeys(row["params"]["gpu"] for row in predicted):
        rows = [row for row in predicted if row["params"]["gpu"] == gpu]
        pairs = [(row, _measured(row, measured, prefix)) for row in rows]
        blocks += [_steps(gpu, pairs, prefix), _categories(gpu, pairs, prefix)]
    return "\n\n".join(blocks)


def _measured(row: Row, measured: list[Row], prefix: str) -> Row | None:
    """The newest measurement of what `row` predicts."""
    for other in reversed(measured):
        same_name = other["part"] == "step" and other["name"] == row["name"].removeprefix(prefix)
        same_sizes = all(other["params"].get(name) == row["params"][name] for name in SIZES)
        if same_name and same_sizes and row["params"]["gpu"] in other["device"].split():
            return other
    return None


def _steps(gpu: str, pairs: list[tuple[Row, Row | None]], prefix: str) -> str:
    columns = ["launches", "MB", "GFLOP", "predicted ms", "predicted imgs/s"]
    has_measured = any(other for _, other in pairs)
    columns += ["measured imgs/s", "measured / predicted ms"] if has_measured else []
    lines = [f"**predict** ({gpu}; {_shared(pairs)})", "", f"| | {' | '.join(columns)} |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for row, other in pairs:
        extra = row["extra"]
        cells = [f"{extra[name]:,.0f}" for name in ("launches", "MB", "GFLOP")]
        cells += [f"{extra['ms']:.2f}", f"{row['p50']:,.0f}"]
        if has_measured:
            cells += [f"{other['p50']:,.0f}", f"{row['p50'] / other['p50']:.2f}"] if other else ["", ""]
        lines.append(f"| {_label(row, prefix)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _categories(gpu: str, pairs: list[tuple[Row, Row | None]], prefix: str) -> str:
    """Predicted milliseconds; "measured / predicted" in brackets where a GPU has measured them."""
    names = list(dict.fromkeys(name for row, _ in pairs for name in row["extra"]["categories"]))
    lines = [f"| ms | {' | '.join(_label(row, prefix) for row, _ in pairs)} |", "| --- |" + " ---: |" * len(pairs)]
    for name in names:
        lines.append(f"| {name} | {' | '.join(_cell(row, other, name) for row, other in pairs)} |")
    text = "\n".join(lines)
    return f"<details><summary>{gpu}, by category (model, not measured)</summary>\n\n{text}\n\n</details>"


def _cell(row: Row, other: Row | None, category: str) -> str:
    cost = row["extra"]["categories"].get(category)
    if cost is None:
        return ""
    us = other["extra"].get("us_by_category", {}).get(category) if other else None
    return f"{cost['ms']:.2f}" + (f" (measured / predicted {us / 1e3 / cost['ms']:.2f})" if us else "")


def _label(row: Row, prefix: str) -> str:
    return f"{row['name'].removeprefix(prefix)}, batch {row['params']['batch_size']}"


def _shared(pairs: list[tuple[Row, Row | None]]) -> str:
    """What the rows have in common, and where they come from."""
    words = []
    for name in ("model", "input_size", "slots"):
        values = {row["params"][name] for row, _ in pairs}
        words += [f"{name.replace('_', ' ')} {values.pop()}"] if len(values) == 1 else []
    commits = sorted({f"commit {row.get('commit', '')}, {row.get('time', '')[:10]}" for row, _ in pairs})
    return ", ".join([*words, *commits])
