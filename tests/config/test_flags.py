"""`--help` shows what a command really fills in; unknown flags say what was meant."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from fastirt import __version__
from fastirt.cli import build_parser, main
from fastirt.config.options import DATASETS, METHODS, RECIPES, Config, flatten
from fastirt.config.presets import resolve
from fastirt.run_config import with_flags


def help_of(command):
    """Field name to the last parenthesis of its help: what `--help` says is filled in."""
    parser = build_parser().commands.choices[command]
    found = {}
    for action in parser._actions:
        if action.dest in flatten(Config().to_dict()) and action.dest not in ("method", "recipe"):
            shown = re.search(r"\(([^()]*)\)$", action.help or "")
            found[action.dest] = shown.group(1).replace("%%", "%") if shown else ""
    return found


def promised(text, recipe, dataset, method, bare):
    """The value that a help text promises under these presets; None where it promises none."""
    default, by_label = None, {}
    for part in filter(None, text.split("; ")):
        labels, colon, value = part.partition(": ")
        if not colon:
            default = part
        for label in labels.split(", ") if colon else ():
            by_label[label.rstrip("*")] = (value, label.endswith("*"))
    value = by_label.get("paper", (default,))[0]
    for label in (recipe, dataset, method):
        if label in by_label and not (bare and by_label[label][1]):
            value = by_label[label][0]
    return value


def as_shown(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


CASES = [
    ("train", recipe, dataset, method)
    for recipe, dataset, method in itertools.product((*RECIPES, None), DATASETS, (*METHODS, None))
] + [("evaluate", recipe, dataset, None) for recipe, dataset in itertools.product((*RECIPES, None), DATASETS)]


@pytest.mark.parametrize("command", ["train", "evaluate", "pack"])
def test_help_shows_what_every_preset_resolves_to(command):
    texts = help_of(command)
    for case, recipe, dataset, method in CASES:
        if case != (command if command != "pack" else "evaluate"):
            continue
        flags = {name: v for name, v in (("recipe", recipe), ("dataset", dataset), ("method", method)) if v}
        if dataset in ("folder", "csv"):
            flags["data_path"] = "required"
        config = flatten(resolve(flags, command).to_dict())
        bare = command == "train" and recipe is None and method is None
        label = recipe or ("demo" if dataset == "demo" else "unofficial" if bare else "paper")
        for name, text in texts.items():
            if name in ("dataset", "resume"):
                continue
            # --recipe replaces most of demo's values.
            own = dataset != "demo" or recipe is None or name in ("data_path", "orientation")
            value = promised(text, label, dataset if own else None, method, bare)
            if value is None:
                assert config[name] in (None, ()), (name, flags, text)
            else:
                assert value == as_shown(config[name]), (name, flags, text)


def test_help_names_every_field_of_the_config():
    assert set(help_of("train")) == {f.name for part in Config().parts().values() for f in dataclasses.fields(part)}


def test_a_default_that_only_one_recipe_has_is_not_shown_as_everybodys():
    texts = help_of("train")
    assert texts["resize"] == "paper: square; unofficial, demo: shorter"
    assert texts["contrastive"].startswith("paper: anchor_sum; unofficial")
    assert texts["orientation"] == "stored; folder, csv, demo: exif"
    assert texts["m"] == "0; sop*, inshop*: 2; demo: 4"


@pytest.mark.parametrize(
    "words, meant",
    [
        ("train --epochs 3", "--max-iter"),
        ("train --learning-rate 1e-4", "--lr"),
        ("train --learning_rate=1e-4", "--lr"),
        ("train --batchsize 4", "--batch-size"),
        ("train --batch_size 4", "--batch-size"),
        ("train --lambda 4", "--lambda-reg"),
        ("evaluate --ranks 4", "--rank"),
        ("pack out --resizesize 4", "--resize-size"),
        ("demo out --class 4", "--classes"),
    ],
)
def test_unknown_flags_suggest_what_was_meant(words, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith(f"fastirt {words.split()[0]}: error: ")
    assert f"did you mean {meant}" in error


def test_a_flag_like_no_other_suggests_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--zzzzqq", "1"])
    assert "did you mean" not in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastirt {__version__}\n"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, (0, 300)),
        ({"save_freq": 7}, (7, 0)),
        ({"save_freq": 0}, (0, 0)),
        ({"save_seconds": 60}, (0, 60)),
        ({"save_freq": 7, "save_seconds": 60}, (7, 60)),
        ({"dataset": "demo"}, (100, 0)),
        ({"dataset": "demo", "save_seconds": 60}, (0, 60)),
    ],
)
def test_checkpoints_by_steps_or_by_time(flags, expected):
    found = resolve(flags)
    assert (found.run.save_freq, found.run.save_seconds) == expected
    tree = found.to_dict()
    assert Config.from_dict(tree) == found
    del tree["run"]["save_seconds"]  # of version 0.1.0
    assert Config.from_dict(tree).run.save_seconds == 0
    resumed = with_flags(found, Path("run"), {"save_freq": 9}).run
    assert (resumed.save_freq, resumed.save_seconds) == (9, 0)
