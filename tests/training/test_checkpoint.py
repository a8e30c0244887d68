"""Checkpoints: round trip, atomic replacement, refusal of what is damaged, foreign or pickled."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastirt.errors import UserError
from fastirt.training import checkpoint

STATE = {
    "step": 3,
    "optimizer": {
        "state": {0: {"exp_avg": torch.arange(6.0).reshape(2, 3).T, "step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
    },
    "flags": [True, None, "text"],
    "dtype": torch.bfloat16,
    "half": torch.ones(2, dtype=torch.bfloat16),
    "empty": {},
}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "checkpoints/step_00000003.safetensors", STATE)
    found = checkpoint.latest(tmp_path)
    state = checkpoint.load(found)
    for name in ("step", "flags", "empty", "dtype"):
        assert state[name] == STATE[name], name
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], STATE["optimizer"]["state"][0]["exp_avg"])
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert state["half"].dtype == torch.bfloat16


def test_only_the_newest_are_kept_and_leftovers_of_a_killed_save_go(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step_00000001.safetensors.1.tmp").write_bytes(b"half")
    for step in range(5):
        checkpoint.save(folder / f"step_{step:08d}.safetensors", {"step": step}, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003.safetensors", "step_00000004.safetensors"]


def test_a_checkpoint_of_an_abandoned_future_is_never_preferred(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (40, 60):
        checkpoint.save(folder / f"step_{step:08d}.safetensors", {"step": step}, keep=2)
    checkpoint.save(folder / "step_00000050.safetensors", {"step": 50}, keep=1)
    assert (folder / "step_00000050.safetensors").exists()
    assert not (folder / "step_00000040.safetensors").exists()
    checkpoint.delete_newer(folder / "step_00000050.safetensors")
    assert checkpoint.latest(tmp_path).name == "step_00000050.safetensors"


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="optimizer.hook"):
        checkpoint.save(tmp_path / "step_00000001.safetensors", {"optimizer": {"hook": lambda: None}})


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "pickle", "foreign", "missing"])
def test_bad_files_are_one_clear_line(tmp_path, damage):
    path = tmp_path / "step_00000001.safetensors"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-5])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 200)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(print))
    elif damage == "foreign":
        save_file({"a": torch.ones(1)}, path)
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_failed_save_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "step_00000001.safetensors"
    checkpoint.save(path, STATE)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def shards_of(path, size, parts):
    """A ring of `size` slots, saved by `parts` ranks; (whole ring, what the checkpoint says of the
    files)."""
    ring = {"embeddings": torch.randn(size, 3), "labels": torch.arange(size)}
    share = -(-size // parts)
    told = []
    for rank in range(parts):
        first = min(size, rank * share)
        own = {name: value[first : first + share] for name, value in ring.items()}
        told.append(checkpoint.save_shard(path, rank, parts, first, own))
    return ring, told


@pytest.mark.parametrize("size, before, after", [(10, 4, 3), (7, 1, 4), (5, 4, 1), (5, 4, 4), (9, 2, 5)])
def test_shards_are_dealt_out_anew(tmp_path, size, before, after):
    path = tmp_path / "step_00000003.safetensors"
    ring, told = shards_of(path, size, before)
    share = -(-size // after)
    for rank in range(after):
        first = min(size, rank * share)
        found = checkpoint.load_shards(path, told[::-1], first, min(share, size - first))
        for name, value in ring.items():
            assert torch.equal(found[name], value[first : first + share])


def test_shards_come_and_go_with_their_checkpoint(tmp_path):
    paths = [tmp_path / f"step_{step:08d}.safetensors" for step in range(4)]
    for path in paths[:3]:
        shards_of(path, 6, 2)
        checkpoint.save(path, {"step": 0}, keep=2)
    shards_of(paths[3], 6, 2)  # killed before the checkpoint itself was written
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(paths[0].with_name("step_00000009.safetensors"), {"step": 9}, keep=2)
    assert sorted(path.name[:15] for path in tmp_path.iterdir()) == [
        "memory_00000002", "memory_00000002", "step_00000002.s", "step_00000009.s",
    ]  # fmt: skip


def test_a_shard_that_is_missing_or_damaged_is_one_clear_line(tmp_path):
    path = tmp_path / "step_00000003.safetensors"
    _, told = shards_of(path, 6, 2)
    file = tmp_path / told[1]["file"]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="memory_00000003_2-of-2"):
        checkpoint.load_shards(path, told, 0, 6)
    file.unlink()
    with pytest.raises(UserError, match="memory_00000003_2-of-2"):
        checkpoint.load_shards(path, told, 3, 3)
    with pytest.raises(UserError, match="do not cover the memory"):
        checkpoint.load_shards(path, told[:1], 0, 6)
