"""A resumed run ends in the weights of an uninterrupted one, in every way to train."""

import pytest

from tests.helpers import assert_same_weights, train_few

WAYS = {
    "lion": "--opt lion",
    "lookahead": "--opt lookahead_adamw",
    "tuple state": "--opt kron",
    "dtype state": "--opt adafactorbv",
    "bf16": "--precision bf16 --memory-dtype bf16",
    "bf16 weights": "--precision bf16-weights",
    "gem": "--pooling gem",
    "pil": "--loader pil",
    "search": "--search torch",
    "dropout": "--drop 0.2 --drop-path 0.2",
    "no memory": "--memory-ratio 0 --encoder-momentum none",
    "clip": "--clip-grad 1 --sched cosine --warmup-iter 2 --keep 1",
    "paper": "--recipe paper",
    "compile": "--engine compile",
    "onednn": "--engine onednn",
    "no cache": "--cache none",
    "layers": "--model-kwargs patch_size=8 embed_dim=48 depth=2 num_heads=3 attn_drop_rate=0.1",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_resumes_bit_for_bit(image_folder, tmp_path, way):
    flags = WAYS[way].split()
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_few(image_folder, whole, *flags) == 0
    half = whole / "checkpoints/step_00000003.safetensors"
    if "--keep" in flags:  # the middle is gone: stop there instead
        assert len(list((whole / "checkpoints").iterdir())) == 1
        assert train_few(image_folder, tmp_path / "both", *flags, "--keep", "2") == 0
        half = tmp_path / "both/checkpoints/step_00000003.safetensors"
    (resumed / "checkpoints").mkdir(parents=True)
    middle = half.rename(resumed / "checkpoints" / half.name)
    assert train_few(image_folder, resumed, *flags, "--resume", middle) == 0
    assert_same_weights(resumed, whole)


def test_longer_training_goes_on_from_a_finished_run(image_folder, tmp_path):
    assert train_few(image_folder, tmp_path / "a", "--max-iter", "3") == 0
    assert train_few(image_folder, tmp_path / "a", "--resume", "--max-iter", "6") == 0
    assert train_few(image_folder, tmp_path / "b") == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")
