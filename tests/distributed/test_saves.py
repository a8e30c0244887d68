"""Ranks that begin and end a save at the same step; here a test writes what the others send."""

import time
from types import SimpleNamespace

import pytest

from fastirt.distributed.failures import ReportedByMainRank
from fastirt.errors import UserError
from fastirt.training.saving import writer
from fastirt.training.saving.writer import CheckpointWriter
from tests.distributed.scripted import ranks_with


def begin(others_fail, done, fail=False):
    """A writer whose first part has just ended on this rank, and its status while that part ran."""

    def parts():
        yield shard
        yield lambda: done.append("checkpoint")
        done.append("end")

    def shard():
        done.append("shard")
        if fail:
            raise UserError("the disk is full")

    saves = CheckpointWriter(ranks_with(2, lambda own: [own, others_fail]))
    saves.begin(parts())
    running = (0, 0)
    while saves.status() == running:
        time.sleep(0.01)
    return saves, running


def test_a_part_of_a_save_ends_once_it_has_ended_on_all_ranks():
    done: list[str] = []
    saves, running = begin(False, done)
    assert saves.status() == (0, -1)
    saves.heed(*max(running, saves.status()))  # the other rank has not ended it
    assert done == ["shard"]
    saves.heed(*saves.status())
    saves.heed(0, -1)  # of the part before
    saves.join()
    assert done == ["shard", "checkpoint", "end"]
    assert saves.status() == (0, -2)


def test_an_error_of_one_rank_ends_the_save_on_all():
    done: list[str] = []
    saves, _ = begin(True, done)
    with pytest.raises(ReportedByMainRank):
        saves.join()
    saves, _ = begin(False, done, fail=True)
    with pytest.raises(UserError, match="the disk is full"):
        saves.heed(*saves.status())
    saves.join()  # nothing is left of it
    assert done == ["shard", "shard"]


def test_rank_0_says_when_a_save_by_time_is_due(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    first, second = (CheckpointWriter(ranks_with(2, lambda own: [own] * 2, rank), 10) for rank in (0, 1))

    def exchange():
        return [max(values) for values in zip(first.status(), second.status())]

    def due(agreed):
        for saves in (first, second):
            saves.heed(*agreed)
        assert first.due == second.due
        return first.due

    assert not due(exchange())
    clock[0] = 10.0
    asked = exchange()
    assert second.status()[0] == 0 and due(asked)
    for saves in (first, second):
        saves.begin(iter([lambda: None]))
    assert not first.due
    assert not due(asked)  # an answer that arrives after the save
    for saves in (first, second):
        saves.join()
    clock[0] = 19.0
    assert not due(exchange())
    clock[0] = 20.0
    assert due(exchange())
