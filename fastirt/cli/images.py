"""`fastirt pack` and `fastirt demo`: files of images."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from fastirt.cli.parser import Command, Parser
from fastirt.config.flags import add_field, add_presets, given
from fastirt.config.options import SUBSAMPLINGS, Config

log = logging.getLogger("fastirt")


def _add_pack(commands: Any) -> Parser:
    pack = commands.add_parser(
        "pack", help="resize a data set's images once and store them in one file", allow_abbrev=False
    )
    pack.add_argument("out", type=Path, help="file to write")
    add_presets(pack, "pack")
    for group, names in (
        ("data", ("dataset", "data_path")),
        ("input", ("input_size", "resize", "resize_size", "orientation")),
    ):
        for field in dataclasses.fields(getattr(Config(), group)):
            if field.name in names:
                add_field(pack, "pack", group, field)
    pack.add_argument("--quality", type=int, default=95, help="JPEG quality (default: %(default)s)")
    pack.add_argument("--subsampling", choices=SUBSAMPLINGS, default="4:4:4", help="JPEG chroma (default: %(default)s)")
    pack.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    return pack


def _add_demo(commands: Any) -> Parser:
    demo = commands.add_parser("demo", help="draw the demo set of rendered products", allow_abbrev=False)
    demo.add_argument("out", type=Path, help="folder to write")
    demo.add_argument("--classes", type=int, default=225, help="number of products (default: %(default)s)")
    demo.add_argument("--views", type=int, default=12, help="images per product (default: %(default)s)")
    demo.add_argument("--width", type=int, default=64, help="of the images in pixels (default: %(default)s)")
    demo.add_argument("--height", type=int, default=64, help="of the images in pixels (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the drawings (default: %(default)s)")
    demo.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    return demo


def _pack(args: dict[str, Any]) -> int:
    from fastirt.config.presets import resolve
    from fastirt.datasets import load_dataset
    from fastirt.images.pack import pack
    from fastirt.images.packed_store import PackedStore

    options = {name: args.pop(name) for name in ("out", "quality", "subsampling", "workers")}
    config = resolve(given(args), "pack")
    log.info("pack: %s", config.describe_input())
    catalog = load_dataset(config.data.dataset, config.data.data_path, training=None)
    out = pack(
        catalog,
        options["out"],
        resize=config.input.resize,
        resize_size=config.input.resize_size,
        quality=options["quality"],
        subsampling=options["subsampling"],
        orientation=config.input.orientation,
        workers=options["workers"],
    )
    store = PackedStore.open(out)
    log.info(
        "pack: wrote %s: %s images, %s of them unreadable, %.1f MB",
        out,
        f"{len(store):,}",
        f"{len(store.bad):,}",
        out.stat().st_size / 1e6,
    )
    return 0


def _demo(args: dict[str, Any]) -> int:
    from fastirt.demo.generate import generate

    print(generate(args.pop("out"), **args))
    return 0


COMMANDS = {"pack": Command(_add_pack, _pack), "demo": Command(_add_demo, _demo)}
