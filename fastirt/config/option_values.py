"""The types of options, values of files checked against them, and what an unknown name may mean."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from functools import lru_cache
from typing import Any, Iterable, NamedTuple, Optional

from fastirt.config.options import METHODS, RECIPES, Config
from fastirt.errors import UserError

NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class OptionType(NamedTuple):
    """What an option holds."""

    kind: type  # int, float, str or bool
    is_list: bool = False  # a tuple of `kind`
    optional: bool = False  # may be None
    choices: tuple[str, ...] = ()
    group: str = ""  # component of the config tree; "": at its top


def option_type(hint: Any, choices: Optional[tuple[str, ...]] = None, group: str = "") -> OptionType:
    """Of a field's annotation: a type, a tuple of one, or an Optional of these."""
    optional = typing.get_origin(hint) is typing.Union
    kind = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    is_list = typing.get_origin(kind) is tuple
    return OptionType(typing.get_args(kind)[0] if is_list else kind, is_list, optional, choices or (), group)


@lru_cache(maxsize=None)
def option_types() -> dict[str, OptionType]:
    """Every option by its name in the config tree."""
    types = {"method": OptionType(str, choices=METHODS), "recipe": OptionType(str, choices=RECIPES)}
    for name, part in Config().parts().items():
        hints = typing.get_type_hints(type(part))
        for field in dataclasses.fields(part):
            types[field.name] = option_type(hints[field.name], field.metadata["choices"], name)
    return types


def option_name(key: Any, place: str, further: Iterable[str] = ()) -> str:
    """The option that a key of a file names, with dashes or underscores. Raises UserError.

    further: names that are allowed too.
    """
    known = {**{name: name for name in (*option_types(), *further)}, "m_per_class": "m"}
    name = str(key).strip().lstrip("-").replace("-", "_")
    if name not in known:
        raise UserError(f"{place}: no such option{_similar(name, known)}")
    return known[name]


def _similar(name: str, known: Iterable[str]) -> str:
    similar = suggestion(f"--{name.replace('_', '-')}", [f"--{other.replace('_', '-')}" for other in known])
    # a key: without the dashes that the flag has
    return f"; did you mean {similar.removeprefix('--').replace(' or --', ' or ')}?" if similar else ""


def option_value(name: str, value: Any, place: str) -> Any:
    """A value of YAML or JSON as the option `name` holds it; lists as tuples. Raises UserError.

    place: file and key, for messages.
    """
    of = option_types()[name]
    if of.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if not of.is_list:
        return _single(of, value, place)
    if name == "model_kwargs" and isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return tuple(_single(of, item, place) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _single(of: OptionType, value: Any, place: str) -> Any:
    if of.choices == ("on", "off") and isinstance(value, bool):
        value = "on" if value else "off"  # YAML 1.1 reads these words so
    parsed = _as_kind(of.kind, value)
    if parsed is None:
        quotes = ": put it in quotes" if of.kind is str and isinstance(value, (int, float)) else ""
        shown = "nothing" if value is None else repr(value)[:60]
        raise UserError(f"{place}: must be {NAMES[of.kind]}, not {shown}{quotes}")
    if of.choices and parsed not in of.choices:
        near = difflib.get_close_matches(str(parsed), of.choices, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{place}: '{parsed}' is none of {', '.join(of.choices)}{meant}")
    return parsed


def _as_kind(kind: type, value: Any) -> Any:
    """None where the value is of another kind. YAML reads 1e-4 as a text: numbers may be texts."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is str or isinstance(value, kind):
        return value if isinstance(value, kind) else None
    if kind is int and isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return kind(value) if isinstance(value, (int, str)) else None
    except (ValueError, OverflowError):
        return None


# Names of these flags in other trainers.
SYNONYMS = {
    "--epochs": "--max-iter (steps: epochs × training images / batch size)",
    "--epoch": "--max-iter (steps: epochs × training images / batch size)",
    "--num-epochs": "--max-iter (steps: epochs × training images / batch size)",
    "--steps": "--max-iter",
    "--max-steps": "--max-iter",
    "--iterations": "--max-iter",
    "--learning-rate": "--lr",
    "--wd": "--weight-decay",
    "--gpu": "--device",
    "--bs": "--batch-size",
    "--batch": "--batch-size",
    "--optimizer": "--opt",
    "--scheduler": "--sched",
    "--warmup": "--warmup-iter",
    "--warmup-steps": "--warmup-iter",
    "--workers": "--num-workers",
    "--img-size": "--input-size",
    "--image-size": "--input-size",
    "--arch": "--model",
    "--backbone": "--model",
    "--checkpoint": "--weights or --resume",
    "--ckpt": "--weights or --resume",
    "--pretrained": "--weights",
    "--data": "--data-path",
    "--data-dir": "--data-path",
    "--data-root": "--data-path",
    "--output": "--output-dir",
    "--out": "--output-dir",
    "--save-dir": "--output-dir",
    "--amp": "--precision bf16",
    "--fp16": "--precision bf16",
    "--bf16": "--precision bf16",
    "--compile": "--engine compile",
    "--gpus": "torchrun --nproc_per_node, or --device",
    "--temperature": "--margin",
    "--loss": "--contrastive",
    "--topk": "--rank",
    "--k": "--rank",
    "--log-interval": "--logging-freq",
    "--save-interval": "--save-freq",
    "--eval-interval": "--eval-freq",
}


def suggestion(flag: str, known: Iterable[str]) -> str:
    """The known flags closest to an unknown one, or ""."""
    flag, known = flag.partition("=")[0], [name for name in known if name.startswith("--")]
    synonym = SYNONYMS.get(flag.replace("_", "-").lower(), "")
    if synonym and synonym.split()[0] in known:
        return synonym
    near = [name for name in known if name == flag.replace("_", "-").lower()]
    near += [name for name in known if len(flag) > 4 and name.startswith(flag) and name not in near]
    near += [name for name in difflib.get_close_matches(flag, known, n=3, cutoff=0.7) if name not in near]
    return " or ".join(near[:3])


def similar_names(name: str, known: Iterable[str]) -> str:
    """The known names closest to an unknown one, or ""."""
    return " or ".join(difflib.get_close_matches(name.replace("-", "_").lower(), list(known), n=2, cutoff=0.6))
