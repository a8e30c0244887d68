"""Order of streams: the captured step, the loader's stream and the caches on it."""

import re

import pytest

from tests.fake_cuda.processes import ROOT, no_gpu, on_fake_gpu, selected
from tests.fake_cuda.settings import LEFT_OUT, OTHER_WAITS

WAIT = re.compile(r"wait_stream\(|wait_event\(|record_event\(|record_stream\(|stream\.wait\(\)|synchronize\(")


@pytest.fixture(scope="module")
def races(request, image_folder):
    """Races by case."""
    names = [*selected(request, "case"), *selected(request, "left_out")]
    return dict(on_fake_gpu("streams_proof", str(image_folder), *names))


@no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", ["device cache", "host cache", "no cache", "each tensor read", "evaluation"])
def test_every_access_is_ordered_after_those_of_other_streams(case, races):
    assert races[case] == []


@no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_a_wait_left_out_is_noticed(left_out, races):
    assert races[left_out], "nothing was reported"
    awaited = [race.split(" does not wait for ")[1] for race in races[left_out]]
    assert any(f" at {LEFT_OUT[left_out][-1]}:" in access for access in awaited), races[left_out]


def test_every_wait_is_left_out_once():
    found = []
    for path in (ROOT / "fastirt/step/cuda_graph.py", *(ROOT / "fastirt/loading").glob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        found += [(module, line) for line in lines if WAIT.search(line)]
    left_out = {(function.split(":")[0], code) for _, function, code, *_ in LEFT_OUT.values() if WAIT.search(code)}
    assert sorted(found) == sorted([*left_out, *OTHER_WAITS])
