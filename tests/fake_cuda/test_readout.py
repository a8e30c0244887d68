"""Metrics, the profiler's marks, DALI's arguments and counts for ranks on a fake GPU."""

import pytest

from tests.fake_cuda.processes import no_gpu, on_fake_gpu, selected
from tests.helpers import needs_dali

pytestmark = [no_gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def proofs(request):
    """Faults by case."""
    return dict(on_fake_gpu("readout_proof", *selected(request, "case")))


@pytest.mark.parametrize("case", ["metrics"])
def test_metrics_are_read_without_waiting(case, proofs):
    assert proofs[case] == []


@pytest.mark.parametrize("case", ["marks, eager", "marks, graph"])
def test_the_profiler_marks_each_phase_once_and_waits_once(case, proofs):
    assert proofs[case] == []


@needs_dali
@pytest.mark.parametrize("case", ["dali"])
def test_dali_decodes_on_the_gpu_as_on_a_cpu(case, proofs):
    assert proofs[case] == []


@pytest.mark.parametrize("case", ["counts"])
def test_counts_are_queued_without_waiting(case, proofs):
    assert proofs[case] == []
