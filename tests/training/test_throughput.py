"""Images a second, MFU and input wait: numbers that add up."""

import time

import pytest
import torch

from fastirt.training.throughput import Throughput
from tests.helpers import read_log


def test_logs_have_utilisation_and_input_wait(finished_run):
    row = read_log(finished_run)[0]
    assert 0 < row["mfu"] < 1
    assert 0 <= row["input_wait"] <= 1
    assert row["imgs_per_s"] > 0


def test_throughput_by_hand():
    speed = Throughput(batch_size=10, flops=4.0, peak=1e4, device=torch.device("cpu"))

    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    for _ in speed.waiting(slow()):
        time.sleep(0.02)
        speed.tick()
    found = speed.read(steps_left=30)()
    assert found["input_wait"] == pytest.approx(0.5, abs=0.2)
    assert found["mfu"] == pytest.approx(found["imgs_per_s"] * 4 / 1e4, rel=0.01)
    # said in tenths
    assert found["seconds_left"] == pytest.approx(300 / found["imgs_per_s"], abs=0.06)
    assert speed.read(5)()["imgs_per_s"] == 0


def test_utilisation_is_a_share_even_where_the_peak_was_guessed_too_low():
    speed = Throughput(batch_size=10, flops=4.0, peak=1e-3, device=torch.device("cpu"))
    time.sleep(0.001)
    speed.tick()
    assert speed.read(1)()["mfu"] == 1.0
