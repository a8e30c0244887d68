"""The page of `fastirt search --html`: queries and what was found for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from fastirt.pages.render import write_page
from fastirt.pages.thumbnails import Thumbnail, of_files

MAX_IMAGES = 1200  # thumbnails on a page: about 8 MB at most
MAX_LINES = 20_000  # of what was found for further queries, as text
FEW = 300  # up to as many are shown larger
SIDES = (160, 96)  # pixels, of few and of many thumbnails

Found = tuple[str, Optional[str], float, dict[str, Any]]


class _Match(NamedTuple):
    name: str
    image: Thumbnail
    similarity: str
    metadata: dict[str, Any]


def write_search_page(
    path: Path | str, title: str, results: Sequence[tuple[str, Optional[str], Sequence[Found]]]
) -> int:
    """Write the results of a search as one HTML file; returns its size in bytes.

    Images become thumbnails in the page: those of the first queries, MAX_IMAGES at most. Of further
    queries names and similarities are listed, MAX_LINES at most; the page says so.

    Args:
        path: file to write.
        title: heading of the page.
        results: for each query its name, its image file or None, and a list of what was found, the
            most similar first: name, image file or None, similarity, metadata by column.

    Raises:
        UserError: the file cannot be written.
    """
    shown: list[tuple[str, Optional[str], Sequence[Found]]] = []
    images = 0
    for query, file, found in results:
        images += 1 + len(found)
        if shown and images > MAX_IMAGES:
            break
        kept = found[: MAX_IMAGES - 1]
        shown.append((query, _file(file), [(name, _file(at), cosine, data) for name, at, cosine, data in kept]))
    files = {file for _, query, found in shown for file in (query, *(match[1] for match in found))}
    side = SIDES[0] if sum(1 + len(found) for *_, found in shown) <= FEW else SIDES[1]
    thumbnails = of_files(files, side)
    queries = [
        (
            name,
            thumbnails[file],
            [_Match(match, thumbnails[at], f"{cosine:.3f}", data) for match, at, cosine, data in found],
        )
        for name, file, found in shown
    ]
    listed: list[tuple[str, list[tuple[str, str]]]] = []
    lines = 0
    for name, _, found in results[len(shown) :]:
        lines += 1 + len(found)
        if lines > MAX_LINES:
            break
        listed.append((name, [(match, f"{similarity:.3f}") for match, _, similarity, _ in found]))
    values = dict(title=title, queries=queries, listed=listed, total=len(results), side=side)
    return write_page(Path(path), "search.html", **values)


def _file(file: Optional[str]) -> Optional[str]:
    return None if file is None else os.fspath(file)
