"""Ranks on GPUs: NCCL with one rank, and two ranks that share a GPU through gloo."""

import pytest
import torch

from fastirt.distributed.ranks import Ranks
from tests.distributed.launch import run
from tests.distributed.steps import steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda:0")
NAMES = ["anchor_sum", "momentum, nonzero_mean", "sharded", "compile", "graph"]


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_on_a_gpu_compute_what_one_process_computes(tmp_path, size):
    """With two ranks on one GPU it is gloo, which cannot be captured."""
    names = NAMES if size == 1 or torch.cuda.device_count() > 1 else NAMES[:-1]
    run(size, "-m", "tests.distributed.steps", str(tmp_path), "cuda", *names)
    everyone = [torch.load(tmp_path / f"{rank}-of-{size}.pt") for rank in range(size)]
    for name in names:
        one, first = steps(name, Ranks(), GPU), everyone[0][name]
        torch.testing.assert_close(first["curve"][:8], one["curve"][:8], rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(first["curve"], one["curve"], rtol=3e-2, atol=3e-3, msg=name)
        for other in everyone[1:]:
            for key, value in first.items():
                if not ("sharded" in name and key in ("memory.embeddings", "memory.labels")):
                    assert torch.equal(value, other[name][key]), (name, key)
