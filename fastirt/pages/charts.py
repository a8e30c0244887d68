"""Line charts and histograms by matplotlib, as inline SVG in the colors of the page.

matplotlib draws in stand-in colors that the SVG then swaps for the page's CSS variables, so that
charts follow its light and dark mode. No chart holds a user's text: legends are HTML.
"""

from __future__ import annotations

import io
import itertools
import re
from typing import Any, Callable, NamedTuple, Optional, Sequence

import markupsafe
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastirt.datasets.records import printable

COLORS = 6  # --c1 to --c6 in style.css
DASHES = ("-", "--", ":")
CSS_DASHES = ("solid", "dashed", "dotted")
POINTS = 400  # of a curve
INK, LINE = "#010203", "#010204"
_STAND_INS = {INK: "currentColor", LINE: "var(--line)"} | {f"#0102{i + 16}": f"var(--c{i + 1})" for i in range(COLORS)}
_SIZE = (4.4, 2.7)  # inches; the page scales it
_numbers = itertools.count()


class Style(NamedTuple):
    """Color and dash of a run in all charts."""

    number: int

    @property
    def color(self) -> str:
        return f"#0102{self.number % COLORS + 16}"

    @property
    def css(self) -> str:
        return f"var(--c{self.number % COLORS + 1})"

    @property
    def dash(self) -> str:
        return DASHES[self.number % len(DASHES)]

    @property
    def css_dash(self) -> str:
        return CSS_DASHES[self.number % len(CSS_DASHES)]


class Curve(NamedTuple):
    """Points (x, y) of a run."""

    style: Style
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    curves: Sequence[Curve],
    label: str,
    *,
    x_label: str,
    markers: bool = False,
    percent: bool = False,
    whole: bool = False,
    log_x: bool = False,
) -> markupsafe.Markup:
    """Curves on common axes. label: for screen readers. percent: y values are fractions;
    whole: from 0 to 1."""

    def draw(axes: Any) -> None:
        for curve in curves:
            x, y = _thinned(curve.x), _thinned(curve.y)
            marker = "o" if markers or len(x) == 1 else None
            axes.plot(x, y, curve.style.dash, color=curve.style.color, linewidth=1.8, marker=marker, markersize=4)
        if log_x:
            ticks = sorted({value for curve in curves for value in curve.x})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        if not log_x:
            axes.set_xlim(left=0)
        if percent and (whole or all(len(curve.x) == 1 for curve in curves)):
            axes.set_ylim(0, 1.02)  # the limits that matplotlib chooses for points say nothing
        axes.set_xlabel(x_label)

    return _svg(draw, label)


def histogram(positive: np.ndarray, negative: np.ndarray, label: str) -> markupsafe.Markup:
    """Shares of positive pairs (filled) and negative pairs (outlined, dashed) by cosine."""
    bins = np.linspace(-1, 1, 61)
    right, wrong = Style(0), Style(1)

    def draw(axes: Any) -> None:
        for values, style, filled in ((positive, right, True), (negative, wrong, False)):
            weights = np.full(len(values), 1 / max(1, len(values)))
            fill: dict[str, Any] = dict(color=style.color, alpha=0.45) if filled else {}
            if filled:
                axes.hist(values, bins, weights=weights, histtype="stepfilled", **fill)
            line = "-" if filled else "--"
            axes.hist(values, bins, weights=weights, histtype="step", color=style.color, linewidth=1.6, linestyle=line)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        axes.set_xlabel("cosine similarity")

    return _svg(draw, label)


def _thinned(values: Sequence[float]) -> list[float]:
    step = max(1, -(-len(values) // POINTS))
    thin = list(values[::step])
    return thin if not len(values) or (len(values) - 1) % step == 0 else [*thin, values[-1]]


def _svg(draw: Callable[[Any], None], label: str) -> markupsafe.Markup:
    settings: Any = {
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastirt",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": LINE,
        "grid.color": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    out = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        draw(axes)
        unwritten: dict[str, Optional[str]] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=unwritten)
    return markupsafe.Markup(_inline(out.getvalue(), label))


def _inline(svg: str, label: str) -> str:
    """The <svg> element alone, with its own ids, sized by the page and named for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    prefix = f"chart{next(_numbers)}-"
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}", svg)
    for stand_in, color in _STAND_INS.items():
        svg = svg.replace(stand_in, color)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height|xmlns:xlink)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{markupsafe.escape(printable(label))}">{body}'.strip()
