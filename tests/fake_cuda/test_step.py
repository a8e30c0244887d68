"""Whole training steps on fake CUDA tensors, and whether faults in them are noticed."""

import linecache
import re

import pytest

from tests.fake_cuda.processes import ROOT, no_gpu, on_fake_gpu, selected
from tests.fake_cuda.settings import PLANTED, SETTINGS

pytestmark = [no_gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def proofs(request):
    """Faults by setting, of all selected settings: starting a process costs more than a step."""
    return {name: faults for name, _, faults in on_fake_gpu("step_proof", *selected(request, "setting"))}


@pytest.fixture(scope="module")
def reports(request):
    """What was reported, by planted fault."""
    return dict(on_fake_gpu("planted", *selected(request, "fault")))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_waits_for_nothing_and_has_the_right_dtypes_devices_and_launches(setting, proofs):
    assert proofs[setting] == []


def test_a_step_runs_on_an_a100_too():
    rows = on_fake_gpu("step_proof", "graph bf16-weights, all, nonzero_mean", device="A100")
    assert [faults for _, _, faults in rows] == [[]]


@pytest.mark.parametrize("device, target", [("H200", ".target sm_90a"), ("A100", ".target sm_80")])
def test_a_recorded_launch_compiles_for_the_device(device, target):
    kernels = ["gather_kernel", "totals_kernel"]
    assert on_fake_gpu("compile_proof", *kernels, device=device) == [[name, target] for name in kernels]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_reported_with_its_line(fault, reports):
    message, code = PLANTED[fault]
    assert reports[fault], "nothing was reported"
    first = reports[fault][0]
    assert message in first
    if code:
        file, line = re.search(r" at ([\w/]+\.py):(\d+)", first).groups()
        assert code in linecache.getline(str(ROOT / file), int(line)), first
