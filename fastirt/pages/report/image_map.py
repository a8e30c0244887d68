"""A map of the test images: those with similar embeddings lie close together."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fastirt.pages.report.embedded_run import EmbeddedRun
from fastirt.pages.report.neighbors import Neighbors, sample
from fastirt.pages.thumbnails import Thumbnails, data_uri

MAX_POINTS = 1000
CELLS, CELL = (40, 25), 36  # columns and rows; pixels
MISS = (213, 94, 0)  # frame of an image whose nearest one is wrong


class ImageMap(NamedTuple):
    """The map as a data URI, its size, and the number of images on it and of those placed."""

    uri: str
    width: int
    height: int
    shown: int
    placed: int


def image_map(run: EmbeddedRun, found: Neighbors, thumbnails: Thumbnails) -> ImageMap:
    """t-SNE (van der Maaten and Hinton 2008) of a sample of the queries, on a grid of cells.

    thumbnails: of the queries by row of the split. Of several images in a cell the first is shown.
    """
    chosen = sample(len(found.queries), MAX_POINTS)
    vectors = run.query.vectors[found.queries[chosen]].numpy()
    cells = _cells(_layout(vectors))
    first = np.unique(cells, axis=0, return_index=True)[1]
    rows = run.query.rows.numpy()[found.queries[chosen]]
    canvas = Image.new("RGBA", (CELLS[0] * CELL, CELLS[1] * CELL))
    small = Thumbnails(thumbnails.source, CELL - 4, thumbnails.orientation)
    shown = 0
    for (column, line), point, image in zip(cells[first], chosen[first], small.images(rows[first])):
        if image is None:
            continue
        corner = (column * CELL + (CELL - image.width) // 2, line * CELL + (CELL - image.height) // 2)
        canvas.paste(image, corner)
        shown += 1
        if found.first_rank[point] > 1:
            box = (column * CELL, line * CELL, (column + 1) * CELL - 1, (line + 1) * CELL - 1)
            ImageDraw.Draw(canvas).rectangle(box, outline=MISS, width=3)
    return ImageMap(data_uri(canvas, "WEBP", quality=75, method=2), *canvas.size, shown, len(chosen))


def _layout(vectors: np.ndarray) -> np.ndarray:
    """(N, 2) places."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    vectors = vectors.astype(np.float64)
    centered = vectors - vectors.mean(axis=0)
    if len(vectors) < 4 or np.abs(centered).max() < 1e-6:  # t-SNE of equal vectors crashes
        side = math.ceil(math.sqrt(len(vectors)))
        return np.stack(np.divmod(np.arange(len(vectors)), side), 1).astype(np.float64)
    components, scales, _ = np.linalg.svd(centered, full_matrices=False)
    start = (components * scales)[:, :2]
    tsne = TSNE(
        init=(1e-4 * start / start[:, 0].std()).astype(np.float32),
        perplexity=min(30.0, (len(vectors) - 1) / 3),
        max_iter=500,
        random_state=0,
    )
    # its many short steps would wait for each other's threads on a busy machine: 0.6 s became 13 s
    with threadpool_limits(1):
        return np.nan_to_num(tsne.fit_transform(vectors.astype(np.float32)))


def _cells(places: np.ndarray) -> np.ndarray:
    """(N, 2) int64 column and row of each place; outliers go to the edge."""
    low, high = np.percentile(places, 1, axis=0), np.percentile(places, 99, axis=0)
    unit = np.clip((places - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.minimum((unit * CELLS).astype(np.int64), np.array(CELLS) - 1)
