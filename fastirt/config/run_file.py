"""Run files: the flags of a run as YAML, `fastirt train --config run.yaml`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastirt.config.option_values import option_name, option_types, option_value
from fastirt.config.options import RECIPES, TRAINING_OPTIONS, Config, save_interval
from fastirt.config.presets import DEMO, scaled_resize
from fastirt.config.presets import RECIPES as PRESETS
from fastirt.errors import UserError

# Of the place where a run ran, not of the run.
OF_THE_PLACE = ("output_dir", "log_dir", "resume", "device")
MAX_BYTES = 2**20
REMEDY = "a run file has lines such as `lr: 1e-4`, or is the run.yaml of a run"
HEADER = (
    "# fastirt {version}: `fastirt train --config run.yaml` repeats this run; flags beside it win.\n"
    "# On another kind of device add --engine auto --loader auto --precision auto.\n"
)


def read_run_file(path: Path, command: str = "train") -> dict[str, Any]:
    """The flags that a run file holds, by option name; `per_query` may be one of them.

    Also takes the config.json of a run. For `evaluate` options of training are left out.
    Raises UserError that names file, key and remedy.
    """
    if path.is_dir():
        raise UserError(f"--config {path}: a folder: pass its run.yaml")
    tree = read_yaml(path, REMEDY)
    is_stored = isinstance(tree.get("config"), dict) and "fastirt" in tree  # config.json
    flags = flags_of_tree(tree["config"] if is_stored else tree, f"{path}: ")
    if is_stored:
        flags = {name: value for name, value in flags.items() if name not in OF_THE_PLACE}
    if command == "evaluate":
        flags = {name: value for name, value in flags.items() if name not in TRAINING_OPTIONS}
    return flags


def flags_of_tree(tree: dict[Any, Any], place: str) -> dict[str, Any]:
    """Flags by option name, from names of flags and from groups as in config.json.

    place: before the key in messages. Raises UserError.
    """
    groups = {of.group for of in option_types().values()} - {""}
    flags: dict[str, Any] = {}

    def put(key: Any, value: Any, group: str = "") -> None:
        at = f"{place}{f'{group}.' if group else ''}{key}"
        name = option_name(key, at, ("per_query",))
        of_group = "" if name == "per_query" else option_types()[name].group
        if group and of_group != group:
            raise UserError(f"{at}: is not of {group} but of {of_group or 'the top'}: move it there")
        if name in flags:
            raise UserError(f"{at}: {name} is given twice: keep one of them")
        if name == "recipe" and value == "demo":
            return  # no flag: chosen by the data set
        flags[name] = str(value) if name == "per_query" else option_value(name, value, at)

    for key, value in tree.items():
        if key in groups and isinstance(value, dict):
            for inner, item in value.items():
                put(inner, item, key)
        elif key in groups and value is None:
            continue  # a group without entries
        elif isinstance(value, dict) and str(key).replace("-", "_") not in option_types():
            near = ", ".join(sorted(groups))
            raise UserError(f"{place}{key}: no such group of options: the groups are {near}")
        else:
            put(key, value)
    return flags


def with_run_file(path: Path | None, flags: dict[str, Any], command: str = "train") -> dict[str, Any]:
    """The flags of a run file below those of the command line, which win. Raises UserError."""
    return flags if path is None else below(read_run_file(path, command), flags)


def below(file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Both together; `flags` win, with what they set by default.

    The resize of --input-size, the other interval of --save-freq, lambda of --method and the values
    of --recipe go with the flag, not with the file.
    """
    file = dict(file)
    if flags.get("recipe", file.get("recipe")) != file.get("recipe"):
        # Else the run of a resolved file is called by one recipe and has the values of the other.
        for name, value in _of_recipe(file).items():
            if file.get(name) == value:
                del file[name]
    if "input_size" in flags and {"input_size", "resize_size"} <= file.keys():
        file["resize_size"] = scaled_resize(
            {"input_size": flags["input_size"]}, file["input_size"], file["resize_size"]
        )
    file.update(save_interval(flags))
    if "dataset" in flags and flags["dataset"] != file.get("dataset", flags["dataset"]):
        for name in {"data_path", "packed", "orientation"}:
            file.pop(name, None)
    if "method" in flags and flags["method"] != file.get("method"):
        for name in ("lambda_reg", "max_iter") if "irt-o" in (flags["method"], file.get("method")) else ("lambda_reg",):
            file.pop(name, None)
    elif "method" in file and "method" not in flags:
        weight = flags.get("lambda_reg")
        if file["method"] == "irt-o" and flags.get("max_iter"):
            del file["method"]
        elif file["method"] != "irt-o" and weight is not None:
            file["method"] = "irt-r" if weight else "irt-l"
    return {**file, **flags}


def _of_recipe(file: dict[str, Any]) -> dict[str, Any]:
    """The values that the recipe of a run file fills in."""
    if "recipe" in file:
        return PRESETS[file["recipe"]]
    return {**DEMO, **save_interval(DEMO)} if file.get("dataset") == "demo" else {}


def run_file_text(config: Config) -> str:
    """The resolved options as a run file, without what belongs to this machine or folder."""
    import yaml

    from fastirt import __version__

    class Dumper(yaml.SafeDumper):
        """Lists on one line."""

    Dumper.add_representer(
        tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
    )
    tree = config.to_dict()
    if tree["recipe"] not in RECIPES:
        del tree["recipe"]  # of the demo set: chosen by --dataset
    for option in OF_THE_PLACE:
        del tree["run"][option]
    text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return HEADER.format(version=__version__) + text


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping that a YAML (or JSON) file holds.

    remedy: what such a file is, for messages. Raises UserError for a file that is missing, too
    large, not YAML or no mapping, and for a key that stands in it twice.
    """
    import yaml

    path = Path(os.path.expanduser(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: more than {MAX_BYTES:,} bytes: {remedy}")
        text = path.read_text(encoding="utf-8-sig")
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
        tree = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8: {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): {remedy}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise UserError(f"{path}: {line}not YAML ({error.problem or error.context}): {remedy}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:200]}): {remedy}") from None
    if not isinstance(tree, dict):
        what = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"{path}: holds {what} instead of `key: value` lines: {remedy}")
    return tree


def _refuse_repeated(node: Any, path: Path) -> None:
    """Raises UserError for a key that stands in one mapping twice: YAML would keep the last."""
    import yaml

    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise UserError(f"{path}: line {line}: {key.value} stands in line {lines[key.value]} too: keep one")
                lines[key.value] = line
            waiting.append(value)
