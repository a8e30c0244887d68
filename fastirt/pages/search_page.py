"""The page of `fastirt search --html`: queries and what was found for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from fastirt.pages.render import write_page
from fastirt.pages.thumbnails import Thumbnail, of_files

MAX_IMAGES = 1200  # thumbnails on a page: about 8 MB at most
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

    Images become thumbnails in the page. The page shows the first queries whose images number at
    most MAX_IMAGES, and says so where that leaves queries out.

    Args:
        path: file to write.
        title: heading of the page.
        results: for each query its name, its image file or None, and a list of what was found, the
            most similar first: name, image file or None, similarity, metadata by column.

    Raises:
        UserError: the file cannot be written.
    """
    shown, images = [], 0
    for query, file, found in results:
        images += 1 + len(found)
        if shown and images > MAX_IMAGES:
            break
        shown.append((query, _file(file), [(name, _file(at), *rest) for name, at, *rest in found[: MAX_IMAGES - 1]]))
    files = {file for _, query, found in shown for file in (query, *(at for _, at, *_ in found))}
    side = SIDES[0] if sum(1 + len(found) for *_, found in shown) <= FEW else SIDES[1]
    thumbnails = of_files(files, side)
    queries = [
        (
            name,
            thumbnails[file],
            [_Match(match, thumbnails[at], f"{similarity:.3f}", metadata) for match, at, similarity, metadata in found],
        )
        for name, file, found in shown
    ]
    return write_page(Path(path), "search.html", title=title, queries=queries, total=len(results), side=side)


def _file(file: Optional[str]) -> Optional[str]:
    return None if file is None else os.fspath(file)
