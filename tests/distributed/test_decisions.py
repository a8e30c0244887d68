"""How one rank acts on what the other ranks send; here a test writes what they send."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastirt.config.options import InputConfig
from fastirt.distributed import backend
from fastirt.distributed.failures import ReportedByMainRank
from fastirt.distributed.host_channel import HostChannel
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError
from fastirt.images.bad_images import BadRows
from fastirt.images.source import FileSource
from fastirt.loading import cache_budget
from fastirt.training.health_checks import check_ranks_in_sync, checksum
from fastirt.training.resume import after_restart
from tests.distributed.scripted import ranks_with

CPU = torch.device("cpu")


@pytest.mark.parametrize("odd, size", [(0, 3), (2, 3), (1, 2), (4, 5)])
def test_the_rank_that_differs_is_blamed(odd, size):
    """By majority, so also rank 0; of two it is rank 1."""
    module = SimpleNamespace(encoder=nn.Linear(3, 2), networks=SimpleNamespace(momentum_encoder=None), memory=None)

    def answers(mine):
        return [{name: value + (rank == odd) for name, value in mine.items()} for rank in range(size)]

    with pytest.raises(UserError, match=f"step 7: weights of rank {odd} no longer equal") as caught:
        check_ranks_in_sync(ranks_with(size, answers), module, 7)
    assert not isinstance(caught.value, ReportedByMainRank)
    with pytest.raises(ReportedByMainRank):
        check_ranks_in_sync(ranks_with(size, answers, rank=1), module, 7)
    check_ranks_in_sync(ranks_with(size, lambda mine: [mine] * size), module, 7)


def test_a_checksum_sees_order_kind_and_place(monkeypatch):
    rows = torch.randn(50, 8)
    other = rows.clone()
    other[[3, 4]] = other[[4, 3]]
    assert checksum([rows]) == checksum([rows.clone()]) != checksum([other])
    assert checksum([rows, other]) != checksum([other, rows])
    assert checksum([-rows]) != checksum([rows])
    assert checksum([rows.bfloat16()]) != checksum([rows])
    whole = checksum([rows, torch.tensor(3), torch.tensor([True, False]), torch.zeros(0, 4)])
    monkeypatch.setattr("fastirt.training.health_checks.CHUNK", 24)
    assert checksum([rows, torch.tensor(3), torch.tensor([True, False]), torch.zeros(0, 4)]) == whole
    image = torch.randn(4, 3, 5, 5)
    assert checksum([image]) == checksum([image.to(memory_format=torch.channels_last)])


def test_many_ranks_exchange_more_rarely(monkeypatch):
    assert [HostChannel(0, size).poll_interval for size in (1, 7, 8, 32, 64, 512)] == [1, 1, 2, 5, 8, 8]
    exchanged = []

    def all_reduce(values, **_):
        exchanged.append(values.tolist())
        # another rank is told before the second
        values.copy_(torch.maximum(values, torch.tensor([15 if len(exchanged) == 2 else 0, -3])))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    channel = HostChannel(0, 8)
    found = [channel.poll((0, -4)) for _ in range(8)]
    assert found == [None, None, None, [0, -3], None, [15, -3], None, [0, -3]]
    assert exchanged == [[0, -4]] * 4 and SINGLE_PROCESS.host.poll((15, 2)) == [15, 2]


@pytest.mark.parametrize(
    "gpus, expected",
    [
        (("", "", ""), "gloo"),
        (("a", "b", "c"), "nccl"),
        (("a", "b", "a"), "gloo"),
        (("a", "", "c"), "rank 1 runs on a CPU, others on GPUs"),
        (("", "b", ""), "rank 0, 2 runs on a CPU"),
    ],
)
def test_all_ranks_choose_the_same_backend(monkeypatch, caplog, gpus, expected):
    chosen = []
    for rank in range(3):
        store = dist.HashStore()
        for other, gpu in enumerate(gpus):
            store.set(f"gpu/{other}", gpu)
        monkeypatch.setattr(backend, "device_identity", lambda device, rank=rank: gpus[rank])
        try:
            chosen.append(backend.choose_backend(store, rank, 3, CPU))
        except UserError as error:
            chosen.append("elsewhere" if isinstance(error, ReportedByMainRank) else str(error))
    if expected in ("gloo", "nccl"):
        assert chosen == [expected] * 3 and ("3 ranks share 2 GPUs" in caplog.text) == (gpus[2] == "a")
    else:
        assert expected in chosen[0] and chosen[1:] == ["elsewhere"] * 2


def test_the_cache_is_where_all_ranks_have_room(monkeypatch):
    made = []
    monkeypatch.setattr(cache_budget, "ImageCache", lambda shapes, device, place: made.append(place))
    monkeypatch.setattr(cache_budget, "free_memory", lambda place, device: 10**9)
    config, gpu = InputConfig(resize_size=18), torch.device("cuda:0")
    source = type("Source", (), {"__len__": lambda self: 10})()
    for device_room, host_room, expected in ((10**9, 10**9, "device"), (10, 10**9, "host"), (10, 10, None)):

        def answers(mine, rooms=(device_room, host_room)):
            return [mine, dict(zip(("device", "host"), rooms)) if isinstance(mine, dict) else mine]

        made.clear()
        cache_budget.make_cache("auto", source, config, gpu, ranks=ranks_with(2, answers))
        assert made == ([expected] if expected else [])


def test_all_ranks_know_the_bad_rows_of_each(tmp_path, caplog):
    """Rank 1 hears of row 3 from rank 0; only rank 0 reports, and with the first reason of a row
    that both found.
    """
    source = FileSource([f"/data/{row}.jpg" for row in range(9)])
    sent = [[[3, "cut off", 7], [5, "empty", 7]], [[5, "gone", 7], [8, "gone", 7]]]
    for rank in (0, 1):
        caplog.clear()
        ranks = ranks_with(2, lambda mine: sent if mine else [[], []], rank=rank)
        bad = BadRows(source, tmp_path / f"{rank}.csv", 3, known=[1], ranks=ranks)
        for row, reason, step in sent[rank]:
            bad.add(row, reason, step)
        assert bad.rows == {1} | {row for row, _, _ in sent[rank]} and not caplog.text
        assert bad.sync(ranks.host) == {3, 5, 8} and bad.rows == {1, 3, 5, 8}
        assert bad.sync(ranks.host) == set()
        assert [text in caplog.text for text in ("3.jpg: cut off", "5.jpg: empty", "8.jpg: gone")] == [rank == 0] * 3
    assert len((tmp_path / "0.csv").read_text().splitlines()) == 4 and not (tmp_path / "1.csv").exists()


def test_under_an_agent_a_second_signal_does_not_kill(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not Ranks().has_agent and Ranks(0, 2).has_agent
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert Ranks().has_agent


def test_what_a_restart_goes_on_from(tmp_path, monkeypatch):
    """An attempt after the first goes on in its own job's folder, from that folder's newest
    checkpoint; nothing else changes."""
    ours, theirs, empty, source = (tmp_path / name for name in ("ours", "theirs", "empty", "source"))
    for folder, job in ((ours, "7"), (theirs, "8"), (source, "1")):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints/step_00000100.safetensors").touch()
        (folder / "config.json").write_text(json.dumps({"job": job}))
    older = str(source / "checkpoints/step_00000100.safetensors")

    def flags(attempt, most=3, **given):
        for name, value in (("RUN_ID", "7"), ("MAX_RESTARTS", most), ("RESTART_COUNT", attempt)):
            monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
        return after_restart(given, SINGLE_PROCESS)

    def goes_on(folder):
        return {"output_dir": str(folder), "resume": ""}

    for folder in (ours, theirs, empty):
        for given in ({"output_dir": str(folder)}, {"output_dir": str(folder), "resume": older}):
            assert flags(0, **given) == given
            assert flags(1, most=0, **given) == given
    assert flags(1, output_dir=str(ours)) == flags(1, output_dir=str(ours), resume=older) == goes_on(ours)
    assert flags(1, output_dir=str(empty)) == goes_on(empty)  # it failed before there was anything
    assert flags(1, output_dir=str(empty), resume=older) == {"output_dir": str(empty), "resume": older}
    # refused before, and again
    assert flags(1, output_dir=str(theirs)) == {"output_dir": str(theirs)}
    assert flags(0) == {"output_dir": "outputs/job-7"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="pass --output-dir too"):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        after_restart({}, SINGLE_PROCESS)
