"""Distributed steps on fake CUDA tensors: what each rank calls, and in which order."""

import pytest

from tests.fake_cuda.processes import no_gpu, on_fake_gpu, selected

pytestmark = [no_gpu, pytest.mark.slow]
JOBS = [
    "2 ranks",
    "2 ranks, momentum encoder, sharded",
    "2 ranks, graph",
    "8 ranks, sharded",
    "8 ranks, momentum encoder",
]


@pytest.fixture(scope="module")
def proofs(request):
    """Faults by job."""
    return dict(on_fake_gpu("collectives_proof", *selected(request, "job")))


@pytest.mark.parametrize("job", JOBS)
def test_all_ranks_call_the_same_collectives_and_wait_for_nothing(job, proofs):
    assert proofs[job] == []


@pytest.mark.parametrize("job", ["planted: one rank has no momentum encoder"])
def test_a_rank_that_calls_another_collective_is_noticed(job, proofs):
    assert proofs[job][0].startswith("collective 6 is ")
    assert "on rank 1" in proofs[job][0]
