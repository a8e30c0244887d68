"""Presets and flags: values filled in, contradictions, and the command lines of the public code."""

import dataclasses
import json
import platform
import resource

import pytest
import torch

from fastirt.cli import build_parser
from fastirt.config.flags import given
from fastirt.config.options import Config
from fastirt.config.presets import resolve
from fastirt.config.validate import validate
from fastirt.distributed.device import choose_device
from fastirt.errors import UserError


def parse(line):
    args = vars(build_parser().parse_args(["train", *line.split()]))
    args.pop("command")
    return resolve(given(args))


PUBLIC_DEFAULTS = dict(
    model="deit_small_distilled_patch16_224",
    input_size=224,
    drop=0.0,
    drop_path=0.1,
    max_iter=2000,
    batch_size=64,
    lr=3e-5,
    opt="adamw",
    opt_eps=1e-8,
    opt_betas=None,
    clip_grad=None,
    momentum=0.9,
    weight_decay=5e-4,
    m=0,
    rank=(1, 2, 4, 8),
    num_workers=16,
    pin_mem=True,
    lambda_reg=0.7,
    margin=0.5,
    memory_ratio=1.0,
    encoder_momentum=None,
    logging_freq=50,
    seed=0,
)


@pytest.mark.parametrize(
    "line, changed",
    [
        ("", {}),
        ("--dataset sop --data-path /d", {"dataset": "sop", "data_path": "/d"}),
        (
            "--model deit_small_patch16_224 --max-iter 35000 --dataset inshop --data-path /d --m 2 "
            "--rank 1 10 20 30 --memory-ratio 0.2 --device cuda:3 --logging-freq 50 "
            "--encoder-momentum 0.999 --lambda-reg 0.0",
            dict(
                model="deit_small_patch16_224",
                max_iter=35000,
                dataset="inshop",
                data_path="/d",
                m=2,
                rank=(1, 10, 20, 30),
                memory_ratio=0.2,
                device="cuda:3",
                encoder_momentum=0.999,
                lambda_reg=0.0,
                method="irt-l",
            ),
        ),
        (
            "--max-iter 0 --dataset cub200 --data-path /d --drop 0.1 --opt-betas 0.9 0.99 --clip-grad 1 "
            "--no-pin-mem --log-dir /l --output-dir /o",
            dict(
                max_iter=0,
                data_path="/d",
                drop=0.1,
                opt_betas=(0.9, 0.99),
                clip_grad=1.0,
                pin_mem=False,
                log_dir="/l",
                output_dir="/o",
                method="irt-o",
            ),
        ),
    ],
)
def test_public_command_lines_keep_their_meaning(line, changed):
    config = parse(line)
    expected = (
        Config()
        .replace(recipe="unofficial", method="irt-r")
        .replace(
            contrastive="nonzero_mean",
            resize="shorter",
            resize_size=256,
            normalization="imagenet",
            eval_descriptor="cls+dist",
        )
        .replace(**{**PUBLIC_DEFAULTS, **changed})
    )
    assert not config.difference(expected)


def test_every_flag_of_the_public_code_exists():
    flags = (
        "--model --input-size --drop --drop-path --max-iter --batch-size --lr --opt --opt-eps --opt-betas "
        "--clip-grad --momentum --weight-decay "
        "--dataset --data-path --m --rank --num-workers --pin-mem --no-pin-mem --lambda-reg --margin "
        "--memory-ratio --encoder-momentum "
        "--logging-freq --output-dir --log-dir --device --seed --method --recipe --weights "
        "--precision --resize-size --eval-freq --save-freq "
        "--resume --memory-dtype --max-bad --memory-start --pooling"
    )
    train = next(a for a in build_parser()._actions if a.dest == "command").choices["train"]
    present = {name for action in train._actions for name in action.option_strings}
    assert set(flags.split()) <= present


def test_every_config_field_is_a_flag_with_help():
    train = next(a for a in build_parser()._actions if a.dest == "command").choices["train"]
    helped = {action.dest for action in train._actions if action.help}
    for part in Config().parts().values():
        assert {f.name for f in dataclasses.fields(part)} <= helped


@pytest.mark.parametrize(
    "line, expected",
    [
        (
            "--method irt-r",
            dict(recipe="paper", contrastive="anchor_sum", resize="square", lambda_reg=0.7, drop_path=0.0),
        ),
        (
            "--method irt-l --dataset inshop",
            dict(m=2, max_iter=35000, memory_ratio=0.2, encoder_momentum=0.999, lambda_reg=0.0, rank=(1, 10, 20, 30)),
        ),
        (
            "--recipe unofficial --dataset sop",
            dict(m=2, max_iter=35000, resize="shorter", method="irt-r", drop_path=0.1, eval_descriptor="cls+dist"),
        ),
        ("--recipe paper --input-size 384", dict(resize_size=439, normalization="model")),
        ("--recipe paper --input-size 384 --resize-size 400", dict(resize_size=400)),
        ("--input-size 384", dict(recipe="unofficial", resize="shorter", resize_size=439)),
        ("--dataset demo --input-size 96", dict(resize_size=108)),
        ("--dataset sop --method irt-r", dict(orientation="stored")),
        ("--dataset folder --data-path d", dict(orientation="exif")),
        ("--dataset cub200 --orientation exif", dict(orientation="exif")),
        ("--method irt-o --dataset sop", dict(max_iter=0, rank=(1, 10, 100, 1000))),
        ("--recipe paper --lambda-reg 0", dict(method="irt-l")),
        ("--dataset demo", dict(weights="scratch", input_size=48)),
        ("--dataset demo --lr 0.5 --method irt-l", dict(lr=0.5, lambda_reg=0.0, method="irt-l", batch_size=64)),
    ],
)
def test_a_preset_fills_in_what_no_flag_says(line, expected):
    config = parse(line)
    flat = {f.name: getattr(part, f.name) for part in config.parts().values() for f in dataclasses.fields(part)}
    flat.update(method=config.method, recipe=config.recipe)
    assert {name: flat[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["evaluate", "pack"])
def test_only_train_takes_the_public_codes_flags_for_its_recipe(command):
    assert resolve({}).recipe == resolve({"recipe": "unofficial"}, command).recipe == "unofficial"
    config = resolve({"dataset": "sop"}, command)
    assert (config.recipe, config.method, config.input.resize) == ("paper", "irt-o", "square")
    # a pack of one is read by the other
    assert resolve({"dataset": "sop", "method": "irt-r"}).input == config.input


@pytest.mark.parametrize(
    "line",
    [
        "--method irt-l --lambda-reg 0.7",
        "--method irt-r --lambda-reg 0",
        "--method irt-o --max-iter 5",
        "--method irt-o --lambda-reg 0.3",
        "--dataset csv",
    ],
)
def test_contradictions_are_errors(line):
    with pytest.raises(UserError, match="--(method|dataset)"):
        parse(line)


@pytest.mark.parametrize(
    "line, flag",
    [
        ("--batch-size 0", "--batch-size"),
        ("--lr nan", "--lr"),
        ("--lr -1", "--lr"),
        ("--rank 0 1", "--rank"),
        ("--logging-freq 0", "--logging-freq"),
        ("--memory-ratio -0.1", "--memory-ratio"),
        ("--encoder-momentum 1.5", "--encoder-momentum"),
        ("--clip-grad 0", "--clip-grad"),
        ("--memory-ratio 0 --encoder-momentum 0.9", "--encoder-momentum"),
        ("--margin 2", "--margin"),
        ("--opt-betas 1.5", "--opt-betas"),
    ],
)
def test_values_out_of_range_name_the_flag(line, flag):
    with pytest.raises(UserError, match=flag):
        validate(parse(line))


def test_command_line_errors_are_one_line(capsys):
    for words in ("train --lr fast", "train --method irt-x", "train --no-such-flag", "frobnicate"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args(words.split())
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_absent_device_names_those_present():
    with pytest.raises(UserError, match="cpu"):
        choose_device("cuda:63")
    with pytest.raises(UserError, match="toaster"):
        choose_device("toaster")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_cpu_does_not_map_the_memory_of_a_step_again():
    choose_device("cpu")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10 << 20)  # 40 MiB: glibc alone maps and unmaps it each time
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(10)) < 1000


def test_config_survives_json():
    config = parse("--dataset demo --opt-betas 0.8 0.9")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
