"""Command-line flags from the config tree, one per field, with the defaults of the presets."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from functools import lru_cache
from typing import Any, Callable, Optional

from fastirt.config.option_values import option_type
from fastirt.config.options import METHODS, RECIPES, Config, flatten
from fastirt.config.presets import resolve

# Name of each preset in `--help`, and the flags that choose it.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("unofficial", {"recipe": "unofficial"}),
    ("sop", {"dataset": "sop"}),
    ("inshop", {"dataset": "inshop"}),
    ("folder", {"dataset": "folder", "data_path": "required"}),
    ("csv", {"dataset": "csv", "data_path": "required"}),
    ("demo", {"dataset": "demo"}),
    ("irt-l", {"method": "irt-l"}),
    ("irt-o", {"method": "irt-o"}),
)
FOOTNOTE = "Defaults marked * apply only with --method or --recipe."


def add_config(parser: argparse.ArgumentParser, command: str) -> None:
    """Add a flag per config field, grouped by component; unused flags are not in the result."""
    add_presets(parser.add_argument_group("Presets"), command)
    config = Config()
    for name, part in config.parts().items():
        group = parser.add_argument_group(type(part).__doc__)
        for field in dataclasses.fields(part):
            add_field(group, command, name, field)


def add_presets(group: Any, command: str) -> None:
    """Add `--method` and `--recipe`."""
    default = {
        "train": "irt-r; irt-o with --max-iter 0, irt-l with --lambda-reg 0",
        "evaluate": "irt-o, or the method of the run or model file",
        "pack": "irt-o; without effect: all methods use the same images",
    }
    group.add_argument(
        "--method",
        choices=METHODS,
        default=argparse.SUPPRESS,
        help=f"irt-o: off the shelf; irt-l: contrastive; irt-r: contrastive + KoLeo ({default[command]})",
    )
    exception = "; without --method: unofficial" if command == "train" else ""
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default=argparse.SUPPRESS,
        help=f"the paper's, or the public re-implementation's (paper{exception})",
    )


def add_field(group: Any, command: str, part: str, field: dataclasses.Field) -> None:
    """Add the flag of one config field, with the type of its annotation."""
    hint = typing.get_type_hints(type(getattr(Config(), part)))[field.name]
    flag = f"--{field.name.replace('_', '-')}"
    text = field.metadata["help"]
    if shown := default_text(command, field.name):
        text = f"{text} ({shown})".replace("%", "%%")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    of = option_type(hint)
    kind: Any = of.kind
    if of.is_list:
        options["nargs"] = "+"
    if field.name == "resume":
        options.update(nargs="?", const="")
    options["metavar"] = "FILE" if field.name == "weights" else {int: "N", float: "X", str: "S"}[kind]
    if field.metadata["choices"]:
        options["choices"] = field.metadata["choices"]
        del options["metavar"]
    if "nargs" not in options and of.optional:
        kind = _or_none(kind)
    flags = (flag, *(f"--{other}" for other in field.metadata.get("aliases", ())))
    group.add_argument(*flags, type=kind, dest=field.name, **options)


def default_text(command: str, name: str) -> str:
    """The default of a field: `256`, or `paper: square; unofficial, demo: shorter` by preset.

    Empty if there is none. A preset with a star applies only with `--method` or `--recipe`.
    """
    base = _values(command)[name]
    by_value: dict[str, list[str]] = {}
    for label, flags in VARIANTS:
        if name in flags and flags[name] != "required":
            continue  # this flag itself chooses the preset
        value = _values(command, label)[name]
        if value != base:
            star = "*" if command == "train" and "dataset" in flags and _bare(label)[name] != value else ""
            by_value.setdefault(_shown(value), []).append(label + star)
    parts = [f"{', '.join(labels)}: {value}" for value, labels in by_value.items()]
    if any("unofficial" in labels for labels in by_value.values()):
        parts.insert(0, f"paper: {_shown(base)}")
    elif base not in (None, ()):
        parts.insert(0, _shown(base))
    return "; ".join(parts)


@lru_cache(maxsize=None)
def _values(command: str, label: Optional[str] = None) -> dict[str, Any]:
    """Field to value for one preset, based on the paper's recipe."""
    base = {"method": "irt-r"} if command == "train" else {}
    return flatten(resolve({**base, **dict(VARIANTS).get(label, {})}, command).to_dict())


@lru_cache(maxsize=None)
def _bare(label: Optional[str] = None) -> dict[str, Any]:
    """Field to value for `train` with neither --method nor --recipe."""
    return flatten(resolve(dict(VARIANTS).get(label, {})).to_dict())


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _or_none(kind: type) -> Callable[[str], Any]:
    """A parser that also accepts `none`, to unset the value of a preset or a stored run."""

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # for argparse's own messages
    return parse


def given(args: dict[str, Any]) -> dict[str, Any]:
    """The flags with lists as tuples, the type of config fields."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
