"""Images of a split to embeddings."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError
from fastirt.images.normalize import normalize
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import Encoder
from fastirt.model.precision import autocast


class Embeddings(NamedTuple):
    """vectors (N, D) float32 on the CPU, of length 1; rows (N,) int64: their rows of the split (unreadable images are left out)."""

    vectors: Tensor
    rows: Tensor


def embed(
    encoder: Encoder,
    loader: EvalLoader,
    paths: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
    name: str = "embed",
    progress: bool = True,
    ranks: Ranks = SINGLE_PROCESS,
) -> Optional[Embeddings]:
    """Embed everything that `loader` yields, in evaluation mode; the encoder's mode is restored.

    dtype: of the encoder's matrix products (bfloat16: autocast). Many ranks each embed their batches of the same size, and rank 0
    alone gets all, in the order of the split; the others get None. Raises UserError for an embedding that is not finite.
    """
    training = encoder.training
    encoder.eval()
    vectors, rows = [], []
    try:
        with (
            torch.inference_mode(),
            tqdm(
                total=len(paths),
                desc=name,
                unit="img",
                disable=None if progress and ranks.is_main else True,
                leave=False,
            ) as bar,
        ):
            for batch in loader:
                images = normalize(batch.images, mean, std, dtype)
                with autocast(dtype, device):
                    out = encoder(images)
                vectors.append(out[: batch.valid])
                rows.append(torch.as_tensor(batch.indices[: batch.valid], dtype=torch.int64))
                bar.update(batch.valid * ranks.world_size)
    finally:
        encoder.train(training)
        loader.close()
    loader.agree()
    own = torch.cat(vectors).float().cpu() if vectors else torch.empty(0, encoder.embed_dim)  # one copy, at the end
    all_vectors = ranks.gather_rows(own)
    all_rows = ranks.gather_rows(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64))
    found = None if all_vectors is None else Embeddings(all_vectors, all_rows)
    ranks.run_on_main(lambda: _check(found, paths, name))
    return found


def _check(found: Embeddings, paths: Sequence[str], name: str) -> None:
    if not len(found.rows):
        raise UserError(f"{name}: no image could be read")
    broken = ~torch.isfinite(found.vectors).all(dim=1)
    if broken.any():
        first = paths[int(found.rows[broken][0])]
        raise UserError(
            f"{name}: {int(broken.sum())} embeddings are not finite, the first of {first}: check the weights, or try --precision fp32"
        )
