"""Loaders and evaluation on fake CUDA tensors, up to the step."""

import pytest

from tests.fake_cuda.processes import no_gpu, on_fake_gpu, selected

pytestmark = [no_gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def proofs(request, image_folder):
    """Faults by case."""
    return dict(on_fake_gpu("input_proof", str(image_folder), *selected(request, "case")))


@pytest.mark.parametrize("case", ["device", "host", "none"])
def test_batches_of_a_cache_are_complete_and_a_captured_step_reads_them_without_waiting(case, proofs):
    assert proofs[case] == []


@pytest.mark.parametrize("case", ["evaluation"])
def test_evaluation_copies_its_embeddings_once(case, proofs):
    assert proofs[case] == []
