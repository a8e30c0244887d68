"""Run files: flags as YAML, below those of the command line."""

import json

import pytest

from fastirt.config.flags import given
from fastirt.config.options import Config, flatten
from fastirt.config.presets import resolve
from fastirt.config.run_file import below, read_run_file, run_file_text, with_run_file
from fastirt.errors import UserError
from tests.helpers import assert_same_weights, last_line, loss_rows, read_config, run_cli

PLACE = {"output_dir", "log_dir", "resume", "device"}


def write(folder, text):
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def test_a_run_file_of_a_run_repeats_it(finished_run, tmp_path):
    for name in ("run.yaml", "config.json"):
        out = tmp_path / name
        assert run_cli("train", "--config", finished_run / name, "--device", "cpu", "--output-dir", out) == 0
        assert [row["loss"] for row in loss_rows(out)] == [row["loss"] for row in loss_rows(finished_run)]
        assert_same_weights(out, finished_run)
        assert (out / "run.yaml").read_text() == (finished_run / "run.yaml").read_text()


def test_evaluate_takes_the_options_of_images_and_model(finished_run, tmp_path):
    out, weights = tmp_path / "out", finished_run / "model.safetensors"
    flags = ("--config", finished_run / "run.yaml", "--rank", 1, "--output-dir", out, "--device", "cpu")
    assert run_cli("evaluate", weights, *flags) == 0
    config = read_config(out)
    assert config["input"]["input_size"] == 16 and config["eval"]["rank"] == [1]
    assert config["method"] == read_config(finished_run)["method"]


def test_every_option_survives_the_way_through_a_file(tmp_path):
    flags = dict(method="irt-l", dataset="sop", data_path="/data/ö #1: x", opt_betas=(0.9, 0.95), clip_grad=1.5)
    config = resolve({**flags, "lr": 1e-5, "model_kwargs": ("depth=4", "x='a'"), "self_check": "off", "pin_mem": False})
    config = config.replace(output_dir="/runs/1", device="cuda:1", log_dir="/logs")
    found = read_run_file(write(tmp_path, run_file_text(config)))
    assert not PLACE & found.keys()
    expected = flatten(config.replace(output_dir=None, device=None, log_dir=None).to_dict())
    assert flatten(resolve(found).to_dict()) == expected
    demo = resolve({"dataset": "demo", "method": "irt-r"})
    assert resolve(read_run_file(write(tmp_path, run_file_text(demo)))) == demo


def test_keys_are_flags_with_dashes_or_underscores_alone_or_in_groups(tmp_path):
    file = write(
        tmp_path,
        """
        lr: 1e-4            # YAML's own rules make this a text
        batch-size: 32
        m-per-class: 4
        model: vit_tiny_patch16_224
        model_kwargs: {depth: 4, embed_dim: 128}
        eval: {rank: 1, eval-freq: 10}
        data:
        cache: none
        self_check: on
        clip-grad: none
        encoder_momentum: null
        tracker: [wandb, mlflow]
        weights: ~
        per-query: rows.csv
        """.replace("\n        ", "\n"),
    )
    expected = dict(lr=1e-4, batch_size=32, m=4, model="vit_tiny_patch16_224", rank=(1,), eval_freq=10, cache="none")
    expected |= dict(self_check="on", clip_grad=None, encoder_momentum=None, tracker=("wandb", "mlflow"), weights=None)
    expected |= dict(model_kwargs=("depth=4", "embed_dim=128"), per_query="rows.csv")
    assert read_run_file(file) == expected
    assert with_run_file(file, given({"lr": 1.0, "rank": [2]})) == {**expected, "lr": 1.0, "rank": (2,)}


def test_flags_win_with_what_they_imply(tmp_path):
    file = dict(method="irt-r", lambda_reg=0.7, input_size=224, resize_size=256, save_freq=0, save_seconds=300)
    file |= dict(dataset="csv", data_path="/a.csv")
    assert resolve(below(file, {"method": "irt-l"})).objective.lambda_reg == 0
    assert resolve(below(file, {"lambda_reg": 0.0})).method == "irt-l"
    assert resolve(below(file, {"lambda_reg": 0.1})).method == "irt-r"
    assert below(file, {"input_size": 112})["resize_size"] == 128
    assert below(file, {"save_freq": 5})["save_seconds"] == 0
    assert "data_path" not in below(file, {"dataset": "demo"})
    for flags in ({"recipe": "unofficial"}, {"dataset": "demo"}):  # resolved files name every option
        asked = {"dataset": "cub200", "data_path": "/d", "method": "irt-r", "lr": 0.5, **flags}
        whole = read_run_file(write(tmp_path, run_file_text(resolve(asked))))
        paper = resolve(below(whole, {"recipe": "paper"}))
        assert paper.difference(resolve({**asked, "recipe": "paper"})) == [] and paper.optim.lr == 0.5
    off = resolve(below({"method": "irt-o", "max_iter": 0, "recipe": "paper"}, {"method": "irt-l"}))
    assert off.method == "irt-l" and off.optim.max_iter == 2000


REFUSED = {
    "learning_rate: 1": "learning_rate: no such option; did you mean lr?",
    "optimizer: {lr: 1}": "optimizer: no such group of options: the groups are data, eval",
    "optim: {model: x}": "optim.model: is not of optim but of model",
    "lr: fast": "lr: must be a number, not 'fast'",
    "lr:": "lr: must be a number, not nothing",
    "batch_size: 1.5": "batch_size: must be a whole number, not 1.5",
    "batch_size: yes": "batch_size: must be a whole number, not True",
    "pin_mem: 1": "pin_mem: must be true or false, not 1",
    "model: 5": "model: must be a text, not 5: put it in quotes",
    "cache: hots": "cache: 'hots' is none of auto, device, host, none; did you mean host?",
    "recipe: mine": "recipe: 'mine' is none of paper, unofficial",
    "rank: [1, two]": "rank: must be a whole number, not 'two'",
    "lr: 1\nlr: 2": "line 2: lr stands in line 1 too",
    "{lr: 1, lr: 2}": "line 1: lr stands in line 1 too",
    "lr: 1\noptim: {lr: 2}": "optim.lr: lr is given twice",
    "- lr": "holds a list instead of `key: value` lines",
    "": "holds nothing",
    "lr: [1": "not YAML",
    "a: !!python/object/apply:os.system [ls]": "not YAML",
    "lr: *x": "not YAML",
    "[" * 1200: "not YAML",
}


def test_a_malformed_file_is_one_line_that_names_file_and_key(tmp_path, capsys):
    for text, message in REFUSED.items():
        file = write(tmp_path, text)
        with pytest.raises(UserError) as error:
            read_run_file(file)
        assert str(error.value).startswith(f"{file}: ") and message in str(error.value), (text, str(error.value))
        assert "\n" not in str(error.value)
    file.write_bytes(b"lr: \xff")
    for path, message in ((file, "UTF-8"), (tmp_path / "none.yaml", "No such file"), (tmp_path, "pass its run.yaml")):
        assert run_cli("train", "--config", path) == 2
        assert message in last_line(capsys)


def test_config_json_of_earlier_versions_is_taken_too(tmp_path):
    tree = {"fastirt": "0.1.0", "config": Config().replace(device="cpu", output_dir="/x").to_dict()}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tree))
    found = read_run_file(file)
    assert found["lr"] == 3e-5 and not PLACE & found.keys()
