"""`report`: tables for a README and plots, from results files alone."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.predict import tables as predicted_tables
from benchmarks.results import FOLDER, key, read

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
MODEL = "model (not measured)"  # the name of a predicted figure starts with it
MODEL_NOTE = "Arithmetic: `predicted` in `benchmarks/parts/scaling.py` states the assumptions and takes these numbers."
# the other parts are folded
HEADLINES = ("step", "train", "input", "cache", "retrieval", "scaling")
RATES = ("GB/s", "TFLOP/s")  # of `extra`: each has a column where a part's figures have it


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", help="results (default: benchmarks/results/*.jsonl)")
    parser.add_argument(
        "--readme", type=Path, help=f"write the tables between the lines {BEGIN} and {END} of this file"
    )
    parser.add_argument("--plots", type=Path, help="write an SVG for each part, unit and device to this folder")


def newest(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(figures, rows of what was not run): the newest of each. A contender that has a figure on a
    device is not listed as not run there."""
    figures, not_run = {}, {}
    for row in sorted(rows, key=lambda row: row.get("time", "")):
        if "not_run" in row:
            not_run[(row["part"], row["name"], row["device"])] = row
        else:
            figures[key(row)] = row
    measured = {(row["part"], row["name"], row["device"]) for row in figures.values()}
    return list(figures.values()), [row for name, row in not_run.items() if name not in measured]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: tables of HEADLINES; the other parts and what was not measured, folded; last, under
    a heading of its own, what a model predicts."""
    figures, not_run = newest(rows)
    figures.sort(key=lambda row: (row["device"].startswith("CPU"), row["device"], _place(row["part"])))
    figures, modelled = split_modelled(figures)
    first = [row for row in figures if row["part"] in HEADLINES]
    others = [row for row in figures if row["part"] not in HEADLINES]
    blocks = [_rows(first)] if first else []
    if others:
        blocks.append(_folded(", ".join(dict.fromkeys(row["part"] for row in others)), _rows(others)))
    if not_run:
        lines = sorted({f"- {row['part']}, {row['name']} ({row['device']}): {row['not_run']}" for row in not_run})
        blocks.append(_folded("Not measured", "\n".join(lines)))
    if modelled:
        steps = [row for row in modelled if row["part"] == "predict"]
        others = [row for row in modelled if row["part"] != "predict"]
        blocks.append("## Model, not measured")
        blocks += [predicted_tables.tables(steps, figures, f"{MODEL}, ")] if steps else []
        blocks += [MODEL_NOTE, _rows(others)] if others else []
    return "\n\n".join(blocks) + "\n"


def split_modelled(figures: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(measured figures, figures of a model): the two never share a table or a plot."""
    modelled = [row for row in figures if row["name"].startswith(MODEL)]
    return [row for row in figures if row not in modelled], modelled


def _place(part: str) -> tuple[int, str]:
    return (HEADLINES.index(part) if part in HEADLINES else len(HEADLINES), part)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _rows(figures: list[dict[str, Any]]) -> str:
    """A table for each part, device and set of sizes; above it what all its rows share."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in figures:
        groups.setdefault((row["part"], row["device"], *row["params"]), []).append(row)
    return "\n\n".join(_block(members) for members in groups.values())


def _block(rows: list[dict[str, Any]]) -> str:
    first, made = rows[0], {_provenance(row) for row in rows}
    shared = [_size(name, value) for name, value in first["params"].items() if name not in _varying(rows)]
    shared += made if len(made) == 1 else []
    modelled = first["name"].startswith(MODEL)
    rates = [rate for rate in RATES if any(rate in row.get("extra", {}) for row in rows)]
    columns = ["predicted"] if modelled else ["median (p20-p80)", *rates, "of the limit here"]
    about = ", ".join(shared) if modelled else f"{first['device']}; {', '.join(shared)}"
    lines = [f"**{first['part']}** ({about})", "", f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        name = ", ".join([row["name"], *(_size(n, v) for n, v in row["params"].items() if n in _varying(rows))])
        name += f" ({_provenance(row)})" if len(made) > 1 else ""
        cells = [f"{_number(row['p50'])} {row['unit']}"] if modelled else _measured_cells(row, rates)
        lines.append(f"| {' | '.join([name.removeprefix(MODEL + ', '), *cells])} |")
    return "\n".join(lines)


def _measured_cells(row: dict[str, Any], rates: list[str]) -> list[str]:
    share, extra = row.get("share_of_limit"), row.get("extra", {})
    value = f"{_number(row['p50'])} {row['unit']} ({_number(row['p20'])}-{_number(row['p80'])})"
    bound = "" if share is None else f"{100 * share:.1f} % of {_number(row['limit'])} {_limit_unit(row)}"
    return [value, *(_number(extra[rate]) if rate in extra else "" for rate in rates), bound]


def _provenance(row: dict[str, Any]) -> str:
    return f"commit {row.get('commit', '')}, {row.get('time', '')[:10]}"


def _size(name: str, value: Any) -> str:
    # Results files say "pictures": another key would keep `compare` from matching older figures.
    label = name.replace("_", " ").replace("pictures", "images")
    return f"{label} {value:g}" if isinstance(value, float) else f"{label} {value}"


def _varying(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the sizes that differ between rows."""
    names = dict.fromkeys(name for row in rows for name in row["params"])
    return [name for name in names if any(row["params"].get(name) != rows[0]["params"].get(name) for row in rows)]


def _limit_unit(row: dict[str, Any]) -> str:
    return row["unit"] + (f" ({row['limit_name']})" if row.get("limit_name") else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plot(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A bar chart for each part, unit, device and set of sizes: median, p20 to p80, and the limit.

    Measured figures only. The same rows give the same bytes. Returns the files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastirt"
    from matplotlib import pyplot

    charts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in split_modelled(newest(rows)[0])[0]:
        charts.setdefault((row["part"], row["unit"], row["device"], *row["params"]), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
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
        if path in written:  # a chart of another set of sizes
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
