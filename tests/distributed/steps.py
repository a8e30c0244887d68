"""Run by every rank: training steps of each variant on its slice of the same global batches.
Results go to a file."""

import sys

import torch

from fastirt.distributed.ranks import Ranks
from fastirt.model.build import build_encoder
from fastirt.step.train_step import build_train_step
from tests.helpers import ROOT, make_batch, tiny_config

STEPS = 20
EXAMPLES = ROOT / "scripts/examples"
VARIANTS = {
    "anchor_sum": dict(contrastive="anchor_sum", clip_grad=0.5),
    "nonzero_mean": dict(contrastive="nonzero_mean"),
    "momentum": dict(contrastive="anchor_sum", encoder_momentum=0.9, drop_path=0.2, memory_start=2),
    "momentum, nonzero_mean": dict(contrastive="nonzero_mean", encoder_momentum=0.9, drop_path=0.2),
    "sharded": dict(contrastive="anchor_sum", memory_sharded=True),
    "sharded, nonzero_mean": dict(contrastive="nonzero_mean", memory_sharded=True, memory_start=3),
    "sharded, momentum": dict(
        contrastive="nonzero_mean", memory_sharded=True, encoder_momentum=0.9, memory_dtype="bf16"
    ),
    "no memory": dict(contrastive="nonzero_mean", memory_ratio=0.0),
    "own parts": dict(
        augment=f"{EXAMPLES}/own_augmentation.py:jitter",
        objective=f"{EXAMPLES}/own_loss.py:supervised_contrastive",
        encoder_momentum=0.9,
        memory_start=2,
    ),
    "own loss": dict(objective=f"{EXAMPLES}/own_loss.py:supervised_contrastive"),
    "fused": dict(contrastive="anchor_sum", loss_impl="triton"),
    "fused, sharded": dict(contrastive="nonzero_mean", loss_impl="triton", memory_sharded=True),
    "compile": dict(contrastive="anchor_sum", engine="compile"),
    # on GPUs alone
    "graph": dict(contrastive="anchor_sum", engine="graph", encoder_momentum=0.9, drop_path=0.2),
    "sgd": dict(contrastive="anchor_sum", opt="sgd", lr=1e-4, drop_path=0.2),
    "sgd, sharded": dict(contrastive="nonzero_mean", opt="sgd", lr=1e-4, memory_sharded=True),
}
SLOTS = 45  # no multiple of the batch, nor of the ranks


def steps(name: str, ranks: Ranks, device: torch.device) -> dict[str, torch.Tensor]:
    """On the CPU: losses of each step, first gradients; weights, momentum encoder and memory at the
    end, and how far training moved the weights."""
    count = 6 if "fused" in name else STEPS  # Triton's interpreter is slow
    config = tiny_config(**{**dict(batch_size=16, seed=3, lr=3e-4), **VARIANTS[name]})
    torch.manual_seed(0)
    encoder = build_encoder(config.model, config.input.input_size)
    step = build_train_step(encoder, config, SLOTS, device, ranks)
    start = [w.detach().clone() for w in step.networks.weights]
    found, curve = {}, []
    first, own = ranks.batch_slice(16)
    for number in range(count):
        before = step.counters.sums.clone()
        step(make_batch(number, 16, device, slice(first, first + own)))
        curve.append(step.counters.sums - before)
        if number == 0:
            found |= {f"grad.{n}": p.grad.clone() for n, p in step.encoder.named_parameters() if p.grad is not None}
    found["curve"], found["wire"] = torch.stack(curve), torch.tensor(step.bytes_moved)
    found["moved"] = torch.stack([(w.detach() - s).norm() for w, s in zip(step.networks.weights, start)]).norm()
    step.engine.release()
    return {name: value.cpu() for name, value in {**found, **step.state_dict()}.items()}


class OneOfMany(Ranks):
    """One rank that runs the collectives of many: a single GPU or CPU can test NCCL or gloo."""

    is_distributed = True


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    if ranks.world_size == 1:
        ranks = OneOfMany()
    out, device, names = sys.argv[1], torch.device(sys.argv[2]), sys.argv[3:]
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    ranks.start(device)
    torch.save({name: steps(name, ranks, device) for name in names}, f"{out}/{ranks.rank}-of-{ranks.world_size}.pt")
    ranks.close()
