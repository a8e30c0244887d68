"""`fastirt index` and `fastirt search`: a gallery of images that is searched by image."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Sequence

from fastirt.cli.embed import add_model, model_of
from fastirt.cli.parser import Command, Parser
from fastirt.errors import UserError

log = logging.getLogger("fastirt")

if TYPE_CHECKING:
    from fastirt.gallery import Gallery, Neighbors
    from fastirt.inference.image_list import ImageList

INDEX = (
    "Embed images and write a gallery: one folder with the model, the vectors, the list and digests of all, which can "
    "be copied elsewhere. Exact search unless --kind names an index."
)
SEARCH = (
    "Find the most similar images of a gallery. Exit code 1 if some of the query images cannot be read: they are "
    "named, and the others answered; 2 for any other error."
)


def _add_index(commands: Any) -> Parser:
    index = commands.add_parser("index", help="make a gallery to search", description=INDEX, allow_abbrev=False)
    add_model(index)
    index.add_argument("images", metavar="PICTURES", help="folder, CSV (other columns: metadata), packed store, or -")
    index.add_argument("folder", metavar="FOLDER", type=Path, help="of the gallery; one that is there is replaced")
    index.add_argument("--add", action="store_true", help="add to the gallery that is in FOLDER, of the same MODEL")
    index.add_argument("--kind", metavar="FACTORY", help="index of FAISS's factory: HNSW32, 'IVF4096,PQ32', ...")
    index.add_argument("--params", default="", metavar="S", help="of that index: nprobe=32, efSearch=64, ...")
    index.add_argument("--store", choices=("files", "lancedb"), default="files", help="lancedb: larger than memory")
    index.add_argument("--parquet", metavar="FILE", type=Path, help="also write path, vector and metadata there")
    index.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at a time (default: 128)")
    return index


def _add_search(commands: Any) -> Parser:
    search = commands.add_parser("search", help="search a gallery by image", description=SEARCH, allow_abbrev=False)
    search.add_argument("folder", metavar="FOLDER", type=Path, help="of the gallery")
    search.add_argument("images", metavar="PICTURE", nargs="+", help="query images; or one folder, CSV file, or -")
    search.add_argument("-k", type=int, default=10, help="neighbors of each (default: 10)")
    search.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="on metadata: 'brand=x', or != < <= > >= in place of =; if repeated, all must hold",
    )
    search.add_argument("--exact", action="store_true", help="exactly, although the gallery has a FAISS index")
    search.add_argument("--json", action="store_true", help="print one JSON document")
    search.add_argument("--html", metavar="FILE", type=Path, help="write a page with the images")
    search.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at a time (default: 128)")
    search.add_argument("--device", metavar="S", help="cuda, cuda:1 or cpu (default: a GPU if there is one)")
    return search


def _index(args: dict[str, Any]) -> int:
    from fastirt.gallery import Gallery
    from fastirt.gallery.parquet import arrow, check_folder

    folder, bad = args["folder"], []

    def on_bad(row: int, name: str, reason: str) -> None:
        log.warning("bad image: %s: %s", name, reason)
        bad.append(name)

    encoding: dict[str, Any] = {"batch_size": args["batch_size"], "progress": True, "on_bad": on_bad}
    if args["parquet"]:  # before hours of embedding
        arrow()
        check_folder(args["parquet"])
    if args["add"]:
        if args["kind"] or args["store"] != "files":
            raise UserError("--add keeps the gallery's index and store: leave out --kind and --store")
        gallery = Gallery.open(folder, model_of(args))
        print(f"added {gallery.add(_to_index(args['images']), **encoding):,} images")
    else:
        options = {name: args[name] for name in ("kind", "params", "store")}
        gallery = Gallery.build(model_of(args), _to_index(args["images"]), folder, **encoding, **options)
    print(describe(gallery))
    if bad:
        print(f"left out, since unreadable: {len(bad):,}")
    if args["parquet"]:
        print(f"{args['parquet']}: {gallery.export_parquet(args['parquet']):,} rows")
    return 0


def _to_index(name: str) -> ImageList:
    """A folder, file or - for a list on stdin."""
    from fastirt.inference.image_list import ImageList

    return _images([name]) if name in ("-", "") else ImageList.at(name)


def _images(names: list[str]) -> ImageList:
    """One folder, file or - for a list on stdin, or several files."""
    from fastirt.inference.image_list import ImageList

    if "" in names:  # else the images of the current folder
        raise UserError("an image has an empty name: is a variable of the shell not set?")
    if names == ["-"]:
        return ImageList.from_text(os.fsdecode(sys.stdin.buffer.read()))
    listed = ImageList.at(names[0]) if len(names) == 1 and Path(names[0]).expanduser().exists() else None
    if listed is None or listed.files == (listed.place,):  # one image: named as it was given
        return ImageList.from_files(names, "images")
    return listed


def describe(gallery: Gallery) -> str:
    """What `fastirt index` prints."""
    lines = [f"{gallery.folder}: {len(gallery):,} images, {gallery.dim} dimensions"]
    if gallery.columns:
        lines.append(f"metadata: {', '.join(gallery.columns)}")
    if found := gallery.index:
        lines.append(
            f"{found['kind']}{' ' * bool(found['params'])}{found['params']}: recall@{found['k']} {found['recall']:.4f} "
            f"against exact search ({found['queries']:,} of its vectors), {found['bytes_per_vector']:,.1f} bytes a "
            f"vector (exact: {4 * gallery.dim:,}), {found['ms']:.2f} ms a query (exact: {found['exact_ms']:.2f})"
        )
    else:
        lines.append(f"exact search, {4 * gallery.dim:,} bytes a vector")
    return "\n".join(lines)


def _search(args: dict[str, Any]) -> int:
    from fastirt.gallery import Gallery

    gallery = Gallery.open(args["folder"], device=args["device"])
    options = {name: args[name] for name in ("k", "where", "exact", "batch_size")}
    images = _images(args["images"])
    results = gallery.search(images, on_bad=_name_bad, **options)
    if args["html"]:
        _write_page(args["html"], gallery, images.files, results)
    print(document(gallery, args, results) if args["json"] else table(results))
    return int(any(result.error for result in results))


def _name_bad(row: int, name: str, reason: str) -> None:
    from fastirt.datasets.records import printable

    print(printable(f"fastirt search: {name}: {reason}"), file=sys.stderr)


def _write_page(out: Path, gallery: Gallery, files: Sequence[Optional[str]], results: list[Neighbors]) -> None:
    from fastirt.pages.search_page import write_search_page

    rows = [
        (
            result.query if not result.error else f"{result.query}: {result.error}",
            None if result.error else file,
            [*zip(result.paths, result.files, result.similarities.tolist(), result.metadata)],
        )
        for file, result in zip(files, results)
    ]
    size = write_search_page(out, f"Search of {gallery.folder}", rows)
    print(f"wrote {out}: {size / 1e6:.2f} MB", file=sys.stderr)


def table(results: list[Neighbors]) -> str:
    """Each query, and a line for each of its neighbors."""
    from fastirt.datasets.records import printable

    lines = []
    for result in results:
        lines.append(printable(f"{result.query}: {result.error}" if result.error else result.query))
        paths = [printable(path) for path in result.paths]
        width = max(map(len, paths), default=0)
        for rank, path in enumerate(paths):
            columns = "  ".join(f"{name}={value}" for name, value in result.metadata[rank].items() if value is not None)
            lines.append(
                f"{rank + 1:5}  {result.similarities[rank]:.4f}  {path:{width}}  {printable(columns)}".rstrip()
            )
        if not result.paths and not result.error:
            lines.append("    no image of the gallery matches")
    return "\n".join(lines)


def document(gallery: Gallery, args: dict[str, Any], results: list[Neighbors]) -> str:
    """The JSON document; fastirt/retrieval/README.md lists its keys."""
    queries = []
    for result in results:
        columns = zip(result.paths, result.files, result.similarities.tolist(), result.metadata)
        neighbors = [
            {"rank": rank, "path": path, "file": file, "similarity": similarity, "metadata": metadata}
            for rank, (path, file, similarity, metadata) in enumerate(columns, 1)
        ]
        queries.append({"query": result.query, "error": result.error or None, "neighbors": neighbors})
    found = {
        "gallery": str(gallery.folder),
        "images": len(gallery),
        "k": args["k"],
        "where": args["where"],
        "exact": args["exact"] or gallery.index is None,
        "queries": queries,
    }
    return json.dumps(found, indent=1)


COMMANDS = {"index": Command(_add_index, _index), "search": Command(_add_search, _search)}
