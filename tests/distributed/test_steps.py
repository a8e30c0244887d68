"""N ranks compute what one rank computes with the same global batch."""

import pytest
import torch

from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.step.engine import choose_engine
from fastirt.step.step_counters import LOSS_NAMES
from tests.distributed.launch import run
from tests.distributed.steps import STEPS, VARIANTS, steps

CPU = torch.device("cpu")
ANYWHERE = [name for name in VARIANTS if name != "graph"]
PLAIN = [name for name in ANYWHERE if not {"fused", "compile"} & set(name.replace(",", "").split())]
EXACT = ("first_bad_step", "number", "memory.pointer", "memory.labels")


@pytest.fixture(scope="module")
def alone():
    """The results of one rank, each computed once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    yield lambda name: found.setdefault(name, steps(name, Ranks(), CPU))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size, names", [(2, ANYWHERE), (4, PLAIN)])
def test_ranks_compute_what_one_computes(tmp_path, size, names, alone):
    """Sums are taken in another order, so values differ by float32 rounding: measured 1e-6 of a
    loss, 8e-7 of a gradient's largest element. Weights under SGD gather one rounding (2^-24 of a
    weight) a step, a random walk. AdamW divides by the gradient's own size, and turns the rounding
    of tiny gradients into whole steps, so its weights are compared to how far training has moved
    them."""
    run(size, "-m", "tests.distributed.steps", str(tmp_path), "cpu", *names)
    everyone = [torch.load(tmp_path / f"{rank}-of-{size}.pt") for rank in range(size)]
    for name in names:
        one, ranks = alone(name), [found[name] for found in everyone]
        first = ranks[0]
        torch.testing.assert_close(first["curve"], one["curve"], rtol=3e-5, atol=3e-6, msg=name)
        assert (one["curve"][-1, : LOSS_NAMES.index("koleo")] != 0).sum() >= (
            2 if "no memory" in name or "own" in name else 3
        )
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
        if name in ("anchor_sum", "sharded"):
            assert first["wire"] == wire_by_hand(size, one, sharded=name == "sharded")


def wire_by_hand(ranks: int, one: dict[str, torch.Tensor], sharded: bool) -> int:
    """Bytes that a rank of a batch of 16 sends and receives in a step without a momentum encoder:
    the labels, embeddings (48 floats), and eight sums and counts with a distance and a neighbour a
    row, of each to each; in shards the gradients of each rank's rows from every other; the weights'
    gradients by a ring, there and back."""
    rows = 16 // ranks
    each = rows * 8 + rows * 48 * 4 + (8 + 2 * rows) * 8 + (rows * 48 * 4 if sharded else 0)
    gradients = sum(value.nbytes for key, value in one.items() if key.startswith("grad."))
    return 2 * (ranks - 1) * each + 4 * (ranks - 1) * gradients // ranks


def test_one_rank_can_go_the_way_of_many(tmp_path, alone):
    """As `test_on_gpu` has it do on a GPU."""
    run(1, "-m", "tests.distributed.steps", str(tmp_path), "cpu", "sgd, sharded")
    found, one = torch.load(tmp_path / "0-of-1.pt")["sgd, sharded"], alone("sgd, sharded")
    torch.testing.assert_close(found["curve"], one["curve"], rtol=3e-5, atol=3e-6)


def test_gloo_is_not_captured():
    ranks = Ranks(rank=0, world_size=2)
    ranks.collectives.backend = "gloo"
    with pytest.raises(UserError, match="gloo .*--engine compile"):
        choose_engine("graph", torch.device("cuda:0"), "adamw", ranks)
    assert choose_engine("auto", torch.device("cuda:0"), "adamw", ranks) == "compile"
