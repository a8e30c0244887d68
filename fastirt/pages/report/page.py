"""From run folders to the page: what is computed, for which run, and how much of it is shown."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np

from fastirt.datasets.digest import evaluation_digest
from fastirt.errors import UserError
from fastirt.pages.charts import Curve, histogram, line_chart
from fastirt.pages.render import check_page, write_page
from fastirt.pages.report import findings
from fastirt.pages.report.embedded_run import EmbeddedRun, RunEmbedder
from fastirt.pages.report.image_map import image_map
from fastirt.pages.report.neighbors import (
    MAX_QUERIES,
    PAIRS,
    Neighbors,
    cosine_sample,
    find_neighbors,
    pca_energy,
)
from fastirt.pages.report.run_list import (
    ListedRun,
    best_first,
    list_runs,
    metrics_table,
    recall_chart,
    training_charts,
)
from fastirt.pages.report.tiles import Album, Row

log = logging.getLogger("fastirt")

MAX_RUNS = 4  # whose images are embedded: the best ones
FAILURES, FAIR, NEAREST = 30, 10, 9  # queries, and neighbors of each
PAIRS_SHOWN, DOUBTFUL, HUBS, DECIDED = 8, 8, 12, 5
LISTED = 1000  # failures in a table without images


class _Looked(NamedTuple):
    """An embedded run and what was computed from it."""

    run: ListedRun
    album: Album
    found: Neighbors
    cosines: tuple[np.ndarray, np.ndarray]
    energy: np.ndarray


def write_report_page(
    path: Path, folders: Sequence[Path], *, sort: Optional[str] = None, data_path: Optional[str] = None
) -> int:
    """Write a page about runs; returns its size in bytes.

    All runs are listed with metrics and curves. The best one's queries and neighbors are shown, and
    compared with those of the other runs that were evaluated on the same images. A run without a
    model or without its images has no neighbors, and the page says why.

    Args:
        path: HTML file to write.
        folders: of the runs.
        sort: column to sort the table by, as in `compare_runs`.
        data_path: where the runs' data set is now; None: where it was.

    Raises:
        UserError: a folder holds no run, `data_path` holds no data set of the best run, or the file
            cannot be written.
    """
    check_page(path)
    runs = list_runs(folders)
    header, rows, published = metrics_table(runs, sort)
    best = best_first(runs)[0]
    values: dict[str, Any] = dict(
        title=f"Report: {best.name}" + (f" and {len(runs) - 1} more" if len(runs) > 1 else ""),
        runs=runs,
        best=best,
        header=header,
        rows=rows,
        published=published,
        recall=recall_chart(runs),
        training=training_charts(runs),
        limits=dict(queries=MAX_QUERIES, runs=MAX_RUNS, pairs=PAIRS),
    )
    looked, notes = _look(best_first(runs), data_path)
    return write_page(path, "report.html", **values, notes=notes, look=_sections(looked) if looked else None)


def _look(runs: list[ListedRun], data_path: Optional[str]) -> tuple[list[_Looked], list[str]]:
    """(the best runs with what they find, notes about those that cannot be looked at)."""
    embed = RunEmbedder(data_path)
    looked: list[_Looked] = []
    notes: list[str] = []
    for run in runs:
        if run.config is None:
            notes.append(f"{run.name} has metrics alone: there is no model to show neighbors of.")
        elif len(looked) == MAX_RUNS:
            notes.append(f"{run.name}: only the best {MAX_RUNS} runs' images were embedded.")
        else:
            try:
                embedded = embed(run.path)
                found = find_neighbors(embedded)
            except UserError as error:
                if data_path is not None:
                    raise
                log.warning("report: %s: no neighbors are shown: %s", run.name, error)
                gone = not os.path.exists(run.config.data.data_path)
                notes.append(
                    f"{run.name}: neither neighbors nor embeddings are shown, because its images or its model cannot "
                    f"be read: {error}." + (" If the images were moved, pass --data-path." if gone else "")
                )
                continue
            if not embedded.as_evaluated:
                notes.append(f"{run.name}: the images are not those that its metrics are of: some were changed since.")
            elif note := _difference(run, embedded, found):
                notes.append(note)
            looked.append(_Looked(run, Album(embedded, found), found, cosine_sample(embedded), pca_energy(embedded)))
    return looked, notes


def _difference(run: ListedRun, embedded: EmbeddedRun, found: Neighbors) -> str:
    """A note if all queries were searched and Recall@1 is not that of metrics.json."""
    stored = run.metrics.get("recall@1")
    complete = len(found.queries) == len(embedded.query.rows) and embedded.config.eval.average == "query"
    now = float((found.first_rank[found.counted] == 1).mean())
    if stored is None or not complete or abs(now - stored) < 5e-5:
        return ""
    return (
        f"{run.name}: embedded here in {embedded.config.model.precision} on {embedded.config.run.device}, Recall@1 is "
        f"{100 * now:.2f} %; its metrics.json has {100 * stored:.2f} %."
    )


def _sections(looked: list[_Looked]) -> dict[str, Any]:
    """What the template shows of the best run, and of the others beside it."""
    best = looked[0]
    album, found = best.album, best.found
    failed = findings.failures(found)
    fair = np.random.default_rng(0).permutation(np.flatnonzero(found.counted))[:FAIR]
    confused, confused_total = findings.confusions(found, PAIRS_SHOWN)
    doubles = findings.doubles(found, album.same_split)
    doubtful = findings.doubtful_labels(found)
    hubs, mean_count = findings.hubs(found, HUBS)
    sections = dict(
        run=best.run,
        place=album.run.catalog.place,
        data=" ".join(dict.fromkeys((album.run.config.data.dataset, Path(album.run.catalog.place).name))),
        queries=len(album.run.query.rows),
        gallery=len(album.run.gallery.rows),
        searched=len(found.queries),
        classes=len(set(found.query_labels.tolist())),
        config=album.run.config,
        failed=len(failed),
        failures=[album.row(int(query), NEAREST) for query in failed[:FAILURES]],
        listed=[album.text(int(query)) for query in failed[:LISTED]],
        fair=[album.row(int(query), NEAREST) for query in sorted(fair)],
        confused=[
            (
                each,
                [album.label(label) for label in each.labels],
                album.query(each.example, "plain"),
                album.neighbor(each.example, 0),
            )
            for each in confused
        ],
        confused_total=confused_total,
        doubles=[(album.query(query, "plain"), album.neighbor(query, place)) for query, place in doubles[:PAIRS_SHOWN]],
        doubles_total=len(doubles),
        double=findings.DOUBLE,
        doubtful=[album.row(query, NEAREST) for query in doubtful[:DOUBTFUL]],
        doubtful_total=len(doubtful),
        agreeing=findings.AGREEING,
        hubs=[(hub, album.gallery(hub.row)) for hub in hubs],
        mean_count=mean_count,
        neighbors=found.rows.shape[1],
        comparisons=[_comparison(best, other, DECIDED if place == 0 else 0) for place, other in enumerate(looked[1:])],
        histograms=[_histogram(each) for each in looked],
        energy=_energy_chart(looked),
        energies=[(each.run, _directions(each.energy), len(each.energy)) for each in looked],
    )
    for each in looked:
        each.album.prepare()
    sections["map"] = image_map(album.run, found, album.thumbnails[0])
    sections["images"] = sum(each.album.images for each in looked)
    sections["side"] = album.thumbnails[0].side
    return sections


def _comparison(best: _Looked, other: _Looked, shown: int) -> dict[str, Any]:
    """The best run against another; rows of up to `shown` queries that one of them alone gets
    right, of each kind. `result` is None where they have other images or no query in common."""
    if len({evaluation_digest(each.album.run.catalog) for each in (best, other)}) > 1:
        return dict(other=other.run, result=None)
    names = [[each.album.name_of_query(q) for q in range(len(each.found.queries))] for each in (best, other)]
    result = findings.compare(best.found, other.found, names)
    if not (result.both or result.neither or result.won or result.lost):
        return dict(other=other.run, result=None)

    def rows(queries: list[tuple[int, int]]) -> list[tuple[Row, Row]]:
        return [(best.album.row(a, NEAREST), other.album.row(b, NEAREST)) for a, b in queries[:shown]]

    return dict(other=other.run, result=result, won=rows(result.won), lost=rows(result.lost))


def _histogram(each: _Looked) -> tuple[Any, ...]:
    """(run, chart, mean of positive pairs, mean of negative pairs)."""
    positive, negative = each.cosines
    means = tuple(float(values.mean()) if len(values) else float("nan") for values in each.cosines)
    label = (
        f"Cosines of {each.run.name}: positive pairs have a mean of {means[0]:.2f}, negative pairs of {means[1]:.2f}"
    )
    return each.run, histogram(positive, negative, label), *means


def _energy_chart(looked: list[_Looked]) -> Any:
    curves = [Curve(each.run.style, range(1, len(each.energy) + 1), each.energy.tolist()) for each in looked]
    said = "; ".join(f"{each.run.name} reaches 90 % with {_directions(each.energy)} directions" for each in looked)
    return line_chart(
        curves, f"Cumulative PCA energy: {said}", x_label="principal directions", percent=True, whole=True
    )


def _directions(energy: np.ndarray, share: float = 0.9) -> int:
    return min(len(energy), int((energy < share).sum()) + 1)
