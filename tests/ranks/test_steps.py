"""N ranks compute what one rank with the same global batch computes: losses, gradients, weights, twin, memory."""

import pytest
import torch

from fastirt.distributed import Ranks
from fastirt.step import LOSS_NAMES
from ranks.launch import run
from ranks.steps import STEPS, VARIANTS, steps

PLAIN = [name for name in VARIANTS if not {"fused", "compile"} & set(name.replace(",", "").split())]
EXACT = ("first_bad_step", "number", "memory.pointer", "memory.labels")


@pytest.fixture(scope="module")
def alone():
    """The results of one rank, each computed once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    yield lambda name: found.setdefault(name, steps(name, Ranks()))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size, names", [(2, list(VARIANTS)), (4, PLAIN)])
def test_ranks_compute_what_one_computes(tmp_path, size, names, alone):
    """Sums are taken in another order, so values differ by float32 rounding: measured 1e-6 of a loss, 8e-7 of a gradient's largest
    element. Weights under SGD gather one rounding (2^-24 of a weight) a step, a random walk. AdamW divides by the gradient's own size, and
    turns the rounding of tiny gradients into whole steps, so its weights are compared to how far training has moved them."""
    run(size, "tests/ranks/steps.py", str(tmp_path), *names)
    everyone = [torch.load(tmp_path / f"{rank}-of-{size}.pt") for rank in range(size)]
    for name in names:
        one, ranks = alone(name), [found[name] for found in everyone]
        first = ranks[0]
        torch.testing.assert_close(first["curve"], one["curve"], rtol=3e-5, atol=3e-6, msg=name)
        assert (one["curve"][-1, : LOSS_NAMES.index("koleo")] != 0).sum() >= (2 if "no memory" in name else 3)
        for key, value in one.items():
            if key.startswith("grad."):
                assert (first[key] - value).abs().max() <= 1e-5 * max(value.abs().max(), 1e-3), (name, key)
        held = [key for key in one if key.startswith(("encoder.", "twin."))]
        apart, held_norm = (
            torch.stack([x.norm() for x in xs]).norm()
            for xs in ([first[k] - one[k] for k in held], [one[k] for k in held])
        )
        rounding = 2**-23 * STEPS**0.5 * held_norm
        assert apart < (rounding if "sgd" in name else 0.02 * one["moved"]), (name, apart, held_norm, one["moved"])
        assert rounding < 1e-3 * one["moved"] or "sgd" not in name  # or it would prove nothing
        for other in ranks[1:]:  # the same bits everywhere
            for key, value in first.items():
                if not ("sharded" in name and key in ("memory.embeddings", "memory.labels")):
                    assert torch.equal(value, other[key]), (name, key)
        if "memory.labels" in one:
            parts = ranks if "sharded" in name else ranks[:1]
            ring = {key: torch.cat([p[f"memory.{key}"] for p in parts]) for key in ("embeddings", "labels")}
            assert torch.equal(ring["labels"], one["memory.labels"]), name
            assert (ring["embeddings"].float() - one["memory.embeddings"].float()).abs().max() < 1e-2, name
        if name == "sharded":
            assert all(len(p["memory.labels"]) <= -(-one["memory.labels"].numel() // size) for p in ranks)
            assert first["wire"] > everyone[0]["anchor_sum"]["wire"] > 0
