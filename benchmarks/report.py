"""`report`: the README's table and plots, from results files and nothing else."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, key, read

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
MODEL = "model (not measured)"  # how the name of a figure that was computed begins
HEADLINES = ("step", "train", "input", "cache", "retrieval", "scaling")  # the other parts are folded away


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", help="results (default: benchmarks/results/*.jsonl)")
    parser.add_argument("--readme", type=Path, help=f"put the table between the lines {BEGIN} and {END} of this file")
    parser.add_argument("--plots", type=Path, help="folder for one SVG a part and device")


def newest(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(figures, what was not run): of each the last; not run counts only where there is no figure on that device."""
    figures, missing = {}, {}
    for row in sorted(rows, key=lambda row: row.get("time", "")):
        if "not_run" in row:
            missing[(row["part"], row["name"], row["device"])] = row
        else:
            figures[key(row)] = row
    have = {(row["part"], row["name"], row["device"]) for row in figures.values()}
    return list(figures.values()), [row for name, row in missing.items() if name not in have]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table of HEADLINES, then, folded, the other parts, what a model predicts, and what was not measured."""
    figures, missing = newest(rows)
    figures.sort(key=lambda row: (row["device"].startswith("CPU"), row["device"], _place(row["part"])))
    figures, modelled = measured(figures)
    first = [row for row in figures if row["part"] in HEADLINES]
    others = [row for row in figures if row["part"] not in HEADLINES]
    blocks = [_rows(first)] if first else []
    if others:
        blocks.append(_folded(", ".join(dict.fromkeys(row["part"] for row in others)), _rows(others)))
    if modelled:
        blocks.append(_folded("Model, not measured", _rows(modelled)))
    if missing:
        lines = sorted({f"- {row['part']}, {row['name']} ({row['device']}): {row['not_run']}" for row in missing})
        blocks.append(_folded("Not measured", "\n".join(lines)))
    return "\n\n".join(blocks) + "\n"


def measured(figures: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(figures that were measured, figures that a model computed): the two never share a table or a plot."""
    computed = [row for row in figures if row["name"].startswith(MODEL)]
    return [row for row in figures if row not in computed], computed


def _place(part: str) -> tuple[int, str]:
    return (HEADLINES.index(part) if part in HEADLINES else len(HEADLINES), part)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _rows(figures: list[dict[str, Any]]) -> str:
    """A table for each part, device and kind of sizes; what all its rows share stands above it."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in figures:
        groups.setdefault((row["part"], row["device"], *row["params"]), []).append(row)
    return "\n\n".join(_block(members) for members in groups.values())


def _block(rows: list[dict[str, Any]]) -> str:
    first, made = rows[0], {_made(row) for row in rows}
    shared = [_size(name, value) for name, value in first["params"].items() if name not in _varying(rows)]
    shared += made if len(made) == 1 else []
    if first["name"].startswith(MODEL):
        lines = [f"**{first['part']}** ({', '.join(shared)})", "", "| | predicted |", "| --- | ---: |"]
    else:
        lines = [
            f"**{first['part']}** ({'; '.join([first['device'], ', '.join(shared)])})",
            "",
            "| | median (p20-p80) | of the limit here |",
            "| --- | ---: | ---: |",
        ]
    for row in rows:
        name = ", ".join([row["name"], *(_size(n, v) for n, v in row["params"].items() if n in _varying(rows))])
        name += f" ({_made(row)})" if len(made) > 1 else ""
        if row["name"].startswith(MODEL):
            lines.append(f"| {name.removeprefix(MODEL + ', ')} | {_number(row['p50'])} {row['unit']} |")
            continue
        share, limit, unit = row.get("share_of_limit"), row.get("limit"), row["unit"]
        value = f"{_number(row['p50'])} {unit} ({_number(row['p20'])}-{_number(row['p80'])})"
        bound = "" if share is None else f"{100 * share:.1f} % of {_number(limit)} {row_unit(row)}"
        lines.append(f"| {name} | {value} | {bound} |")
    return "\n".join(lines)


def _made(row: dict[str, Any]) -> str:
    return f"commit {row.get('commit', '')}, {row.get('time', '')[:10]}"


def _size(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"


def _varying(rows: list[dict[str, Any]]) -> list[str]:
    """The sizes in which rows differ."""
    names = dict.fromkeys(name for row in rows for name in row["params"])
    return [name for name in names if any(row["params"].get(name) != rows[0]["params"].get(name) for row in rows)]


def row_unit(row: dict[str, Any]) -> str:
    return row["unit"] + (f" ({row['limit_name']})" if row.get("limit_name") else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plot(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One bar chart a part, unit, device and kind of sizes: median, p20 to p80, and the limit, of what was measured. The
    same rows give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastirt"
    from matplotlib import pyplot

    charts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in measured(newest(rows)[0])[0]:
        charts.setdefault((row["part"], row["unit"], row["device"], *row["params"]), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (part, unit, device, *_), bars in charts.items():
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.34 * len(bars)), layout="constrained")
        varying = _varying(bars)
        sizes = [" ".join(f"{n}={v}" for n, v in bar["params"].items() if n in varying) for bar in bars]
        names = [f"{bar['name']}\n{size}".strip() for bar, size in zip(bars, sizes)]
        middle = [bar["p50"] for bar in bars]
        spread = [[max(0, b["p50"] - b["p20"]) for b in bars], [max(0, b["p80"] - b["p50"]) for b in bars]]
        axes.barh(range(len(bars)), middle, xerr=spread, color="#4878a8", ecolor="#333333", capsize=2)
        for place, bar in enumerate(bars):
            if bar.get("limit"):
                axes.plot([bar["limit"]] * 2, [place - 0.4, place + 0.4], color="#c44e52")
        axes.set_yticks(range(len(bars)), names, fontsize=7)
        axes.invert_yaxis()
        limits = any(bar.get("limit") for bar in bars)
        axes.set_xlabel(f"{unit} (red: this machine's limit)" if limits else unit)
        axes.set_title(f"{part}, {device}", fontsize=9)
        stem = re.sub(r"[^a-z0-9]+", "-", f"{part} {unit} {device}".lower()).strip("-")
        path = folder / f"{stem}.svg"
        if path in written:  # another kind of sizes
            path = folder / f"{stem}-{sum(old.name.startswith(stem) for old in written) + 1}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def main(args: argparse.Namespace) -> int:
    files = args.files or sorted(FOLDER.glob("*.jsonl"))
    try:
        rows = read(files)
        if not rows:
            raise ValueError(f"no results in {', '.join(map(str, files)) or FOLDER}: run a part first")
        text = table(rows)
        print(text)
        if args.readme:
            _insert(args.readme, text)
        if args.plots:
            for path in plot(rows, args.plots):
                print(f"wrote {path}")
    except ImportError:
        print("report: error: plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


def _insert(path: Path, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise ValueError(f"{path}: needs one line {BEGIN} and, after it, one line {END}")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
