"""Images a second, MFU and input wait: numbers that add up."""

import time

import pytest
import torch

from fastirt.training.run_log import duration
from fastirt.training.throughput import Throughput
from tests.helpers import read_log


def test_logs_have_images_and_input_wait_and_no_utilization_of_a_cpu(finished_run):
    row = read_log(finished_run)[0]
    assert "mfu" not in row
    assert 0 <= row["input_wait"] <= 1
    assert row["imgs_per_s"] > 0


def test_time_left_in_words():
    assert [duration(s) for s in (11.6, 200, 15908, float("inf"))] == [
        "12 s",
        "3 min 20 s",
        "4 h 25 min",
        "unknown time",
    ]


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


@pytest.mark.parametrize("flops, peak", [(4.0, None), (0, 1e12)])
def test_no_utilization_without_a_data_sheet_or_a_count_of_operations(flops, peak):
    speed = Throughput(batch_size=10, flops=flops, peak=peak, device=torch.device("cpu"))
    speed.tick()
    found = speed.read(1)()
    assert "mfu" not in found and found["imgs_per_s"] > 0
