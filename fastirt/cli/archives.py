"""`fastirt download` and `fastirt verify`: published data sets, and whether a copy is whole."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser
from fastirt.config.components import DATASETS, OrUserCode

log = logging.getLogger("fastirt")

SHOWN = 20  # problems
DAY = 86400  # seconds


def _add_download(commands: Any) -> Parser:
    download = commands.add_parser(
        "download",
        help="fetch and unpack a published data set",
        description="Fetch a published data set, check its digest and unpack it. A call that was stopped goes on.",
        allow_abbrev=False,
    )
    download.add_argument("dataset", choices=("cub200", "sop", "inshop"), help="inshop: says what a person must do")
    download.add_argument("folder", type=Path, metavar="FOLDER", help="gets the archive, and the data set beside it")
    source = download.add_mutually_exclusive_group()
    source.add_argument("--url", nargs="+", default=[], help="mirrors to use instead; the digest is checked")
    source.add_argument("--archive", type=Path, metavar="FILE", help="the archive, if it is on disk already")
    download.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", default=30.0, help="without a byte (default: %(default)s)"
    )
    return download


def _add_verify(commands: Any) -> Parser:
    verify = commands.add_parser(
        "verify",
        help="check digests, counts and the decoding of every file of a data set",
        description="Check a data set. Exit code 0: nothing is wrong; 1: the lines below the table say what is.",
        allow_abbrev=False,
    )
    names = f"{', '.join(DATASETS)}, or FILE.py:NAME"
    verify.add_argument("dataset", choices=OrUserCode(DATASETS), metavar="DATASET", help=names)
    verify.add_argument("path", metavar="PATH", help="as --data-path takes it")
    verify.add_argument("--packed", type=Path, metavar="STORE", help="check each image of this packed store too")
    verify.add_argument("--workers", type=_threads, default=None, metavar="N", help="threads (default: one per core)")
    return verify


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= DAY:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most {DAY}")
    return seconds


def _threads(text: str) -> int:
    threads = int(text)
    if threads < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0, which is one per core")
    return threads


def _download(args: dict[str, Any]) -> int:
    from fastirt.datasets import PUBLISHED as LOADERS
    from fastirt.datasets.archives.download import download, is_complete
    from fastirt.datasets.archives.published import INSHOP_BY_HAND, PUBLISHED
    from fastirt.datasets.archives.transfer import Patience

    published, load, folder = PUBLISHED[args["dataset"]], LOADERS[args["dataset"]], args["folder"]
    if published.archive is None:
        if folder.is_dir() and is_complete(published, load, folder):
            log.info("download: %s is there already, complete", folder)
            return 0
        print(INSHOP_BY_HAND.format(folder=folder))
        return 2
    root = download(
        published,
        load,
        folder,
        urls=args["url"],
        archive_file=args["archive"],
        patience=Patience(timeout=args["timeout"]),
    )
    print(f"--dataset {args['dataset']} --data-path {root}")
    return 0


def _verify(args: dict[str, Any]) -> int:
    from fastirt.config.presets import resolve
    from fastirt.datasets import load_dataset
    from fastirt.datasets.archives.published import PUBLISHED
    from fastirt.errors import UserError
    from fastirt.images.verify import Report, check_archives, verify

    dataset, path = args["dataset"], args["path"]
    config = resolve({"dataset": dataset, "data_path": path}, "pack")
    published = PUBLISHED.get(dataset)
    if not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{path}: no such file or folder: pass what --data-path takes")
    if args["packed"] is not None and not args["packed"].is_file():
        raise UserError(f"--packed {args['packed']}: no such file: pass one that `fastirt pack` made")
    try:
        catalog = load_dataset(dataset, path, training=None)
    except UserError as error:
        report = Report()
        if published is not None:
            check_archives(published, Path(os.path.abspath(os.path.expanduser(path))), report)
        report.add("the list and its files", "incomplete", problem=str(error))
    else:
        report = verify(
            catalog,
            published,
            packed=args["packed"],
            orientation=config.input.orientation,
            threads=args["workers"] or len(os.sched_getaffinity(0)),
        )
    print(report.table())
    for problem in report.problems[:SHOWN]:
        print(f"wrong: {problem}")
    if (more := len(report.problems) - SHOWN) > 0:
        print(f"… and {more:,} more")
    print(f"{dataset} at {path}: {'nothing is wrong' if not report.problems else f'{len(report.problems):,} wrong'}")
    return 1 if report.problems else 0


COMMANDS = {"download": Command(_add_download, _download), "verify": Command(_add_verify, _verify)}
