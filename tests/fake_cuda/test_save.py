"""Checkpoints of a run on a fake GPU."""

import pytest

from tests.fake_cuda.processes import no_gpu, on_fake_gpu, selected

pytestmark = [no_gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def proofs(request):
    """Faults by case."""
    return dict(on_fake_gpu("save_proof", *selected(request, "case")))


@pytest.mark.parametrize("case", ["save"])
def test_the_loop_queues_copies_to_page_locked_memory_and_a_thread_waits_for_them(case, proofs):
    assert proofs[case] == []


@pytest.mark.parametrize("case", ["planted: memory that is not page-locked"])
def test_copies_to_other_memory_are_noticed(case, proofs):
    assert any("a copy that waits" in fault and "saving/snapshot.py" in fault for fault in proofs[case])
