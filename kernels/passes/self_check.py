"""Each custom kernel beside its plain twin on one small batch, one JSON line for each.

    python -m fastirt.kernels.passes.self_check DEVICE KERNEL...

The first line, {"ready": true}, says that the batch is on the device. Each further line has
`kernel`, `status` ("ok", "failed", "unused" or "unchecked"), `detail` and `seconds`. A kernel that
hangs prints nothing: whoever starts this process ends it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fastirt import kernels
from fastirt.kernels.checks import choose_impl

ROWS, SLOTS, DIM = 64, 500, 384
VIEWS, SIDE, CROP = 6, 40, 32
BANDS = 12  # thresholds of each query, as many as SOP has
PRECISION = "tf32"  # of a run in bf16, the default on a GPU
# Of the expected norm. Rounding to tf32 gives 0.002 at most, and a wrong kernel much more.
TOLERANCE = 0.02
LIFETIME = 600  # seconds; ends a process whose kernel hangs when its parent was killed

Values = dict[str, Tensor]


class SmallBatch(NamedTuple):
    """Arguments of `contrastive_koleo`, and views of stored images."""

    z: Tensor
    labels: Tensor
    memory: Tensor
    memory_labels: Tensor
    memory_self: Tensor
    pixels: Tensor


def small_batch(device: torch.device) -> SmallBatch:
    """Two unit vectors of each image, 16 classes in 8 groups; always the same.

    Cosines are near 0.95 within an image, 0.8 within a class, 0.65 within a group, else 0: rounding
    moves no pair across the margin of 0.5 and changes no nearest neighbor. Padding and empty slots
    are full of large numbers, which must not spread; training promises that they are finite.
    """
    generator = torch.Generator().manual_seed(0)

    def directions(count: int) -> Tensor:
        return F.normalize(torch.randn(count, DIM, generator=generator), dim=1)

    images = torch.arange((ROWS + SLOTS) // 2).repeat_interleave(2)
    classes = images % 16
    parts = [(0.65, directions(8)[classes // 2]), (0.15, directions(16)[classes])]
    parts += [(0.15, directions(len(images) // 2)[images]), (0.05, directions(len(images)))]
    vectors = F.normalize(sum(share**0.5 * part for share, part in parts), dim=1)
    z, labels = vectors[:ROWS].clone(), classes[:ROWS].clone()
    memory, memory_labels = vectors[ROWS:].clone(), classes[ROWS:].clone()
    own = torch.where(torch.arange(ROWS) < ROWS // 2, torch.arange(ROWS) + 7, -1)
    memory[own[own >= 0]], memory_labels[own[own >= 0]] = z[own >= 0], labels[own >= 0]
    z[-2:], labels[-2:] = 1e4, -1
    memory[8::9], memory_labels[8::9] = 1e4, -1
    pixels = torch.randint(0, 256, (VIEWS * SIDE * SIDE * 3,), dtype=torch.uint8, generator=generator)
    return SmallBatch(*(value.to(device) for value in (z, labels, memory, memory_labels, own, pixels)))


def contrastive_koleo(batch: SmallBatch, impl: str) -> Values:
    values: Values = {}
    for reduction in kernels.REDUCTIONS:
        z = batch.z.clone().requires_grad_()
        losses = kernels.contrastive_koleo(
            z, batch.labels, batch.memory, batch.memory_labels, memory_self=batch.memory_self,
            reduction=reduction, precision=PRECISION, finite_slots=True, impl=impl,
        )  # fmt: skip
        sum(losses).backward()
        values |= {f"{name} of {reduction}": loss.detach() for name, loss in losses._asdict().items()}
        values[f"gradient of {reduction}"] = z.grad
    return values


def pair_stats(batch: SmallBatch, impl: str) -> Values:
    return kernels.pair_stats(
        batch.z, batch.labels, batch.memory, batch.memory_labels, self_slots=batch.memory_self,
        precision=PRECISION, finite_slots=True, impl=impl,
    )._asdict()  # fmt: skip


def pair_grad(batch: SmallBatch, impl: str) -> Values:
    scale_pos, scale_neg = batch.z.new_tensor([0.5, 2.0])
    gradient = kernels.pair_grad(
        batch.z, batch.labels, batch.memory, batch.memory_labels, self_slots=batch.memory_self,
        scale_pos=scale_pos, scale_neg=scale_neg, precision=PRECISION, finite_slots=True,
        impl=impl,
    )  # fmt: skip
    return {"gradient": gradient}


def nearest(batch: SmallBatch, impl: str) -> Values:
    return kernels.nearest(
        batch.z, row_labels=batch.labels, col_labels=batch.labels, precision=PRECISION, impl=impl
    )._asdict()


def koleo_grad(batch: SmallBatch, impl: str) -> Values:
    rho, index = kernels.nearest(batch.z, row_labels=batch.labels, col_labels=batch.labels, impl="reference")
    scale = batch.z.new_tensor(0.5)
    return {"gradient": kernels.koleo_grad(batch.z, batch.z, rho, index, scale=scale, impl=impl)}


def gather_views(batch: SmallBatch, impl: str) -> Values:
    device = batch.pixels.device
    starts = torch.arange(VIEWS, device=device) * (SIDE * SIDE * 3)
    picks = torch.tensor([[i, i, SIDE - CROP - i, i % 2] for i in range(VIEWS)], device=device)
    table = torch.linspace(-2, 2, 768, device=device).view(256, 3).bfloat16()
    out = torch.zeros(VIEWS, CROP, CROP, 3, dtype=table.dtype, device=device)
    kernels.gather_views(out, batch.pixels, starts, torch.full_like(starts, SIDE), picks, table, impl=impl)
    return {"bytes": out.view(torch.int16)}


def count_similarities(batch: SmallBatch, impl: str) -> Values:
    """Bands of `similarity_error` around those similarities that are furthest from any other one.

    Similarities of the permitted error are in these bands, and no other ones are.
    """
    query, gallery = batch.z[batch.labels >= 0], batch.memory[batch.memory_labels >= 0]
    exact = (query.double() @ gallery.double().T).sort(dim=1).values
    steps = exact.diff(dim=1)
    alone = torch.minimum(steps[:, 1:], steps[:, :-1]).topk(BANDS, dim=1).indices + 1
    own = exact.gather(1, alone).float()
    error = kernels.similarity_error(DIM)
    return kernels.count_similarities(query, gallery, own - error, own + error, impl=impl)._asdict()


CHECKS: dict[str, Callable[[SmallBatch, str], Values]] = {
    check.__name__: check
    for check in (contrastive_koleo, pair_stats, pair_grad, nearest, koleo_grad, gather_views, count_similarities)
}
# Kernels that share a process: a run on several GPUs uses the second group as a whole.
GROUPS = (
    ("contrastive_koleo",),
    ("pair_stats", "pair_grad", "nearest", "koleo_grad"),
    ("gather_views",),
    ("count_similarities",),
)


def deviation(found: Values, expected: Values) -> Optional[str]:
    """What differs, or None: integers must be equal, floats within TOLERANCE of the norm."""
    for name, right in expected.items():
        error = (found[name].double() - right.double()).norm().item()
        limit = TOLERANCE * right.double().norm().item() if right.is_floating_point() else 0.0
        if not error <= limit:  # NaN fails too
            return f"{name} deviates by {error:.2g} from plain PyTorch, allowed are {limit:.2g}"
    return None


def check(name: str, batch: SmallBatch) -> tuple[str, str]:
    """(status, detail) of one kernel; see the module."""
    if name != "gather_views" and batch.z.is_cuda and choose_impl("auto", batch.z) == "reference":
        return "unused", "there are no tiles for this GPU"
    try:
        fault = deviation(CHECKS[name](batch, "triton"), CHECKS[name](batch, "reference"))
    except torch.OutOfMemoryError as error:
        return "unchecked", _one_line(error)  # of another program on this GPU
    except Exception as error:  # whatever a compiler or driver raises
        return "failed", f"raises {_one_line(error)}"
    return ("failed", fault) if fault else ("ok", "")


def code_digest(*folders: Path) -> str:
    """SHA-256 of the Python files in folders; by default the kernels'."""
    digest = hashlib.sha256()
    for folder in folders or (Path(kernels.__file__).parent,):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def main(device: str, *names: str) -> None:
    faulthandler.dump_traceback_later(LIFETIME, exit=True)
    batch = small_batch(torch.device(device))
    if batch.z.is_cuda:
        torch.cuda.set_device(batch.z.device)
        torch.cuda.synchronize()
    print(json.dumps({"ready": True}), flush=True)
    for name in names:
        start = time.perf_counter()
        status, detail = check(name, batch)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"kernel": name, "status": status, "detail": detail, "seconds": seconds}), flush=True)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main(*sys.argv[1:])
