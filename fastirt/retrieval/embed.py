"""Images of a split to embeddings."""

from __future__ import annotations

from typing import Iterator, NamedTuple, Optional, Sequence

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
    """Embeddings of a split without its unreadable images.

    Attributes:
        vectors: (N, D) float32 on the CPU, of length 1.
        rows: (N,) int64, their rows of the split.
    """

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
    """Embed all images of a loader in evaluation mode; the encoder's mode is restored.

    Args:
        encoder: on `device`.
        loader: images of a split; it is closed at the end.
        paths: files of the split, for messages.
        mean: per channel, of images in [0, 1].
        std: likewise.
        device: of the encoder and the batches.
        dtype: of the encoder's matrix products; bfloat16 uses autocast.
        name: of the split, for the progress bar and messages.
        progress: show a progress bar.
        ranks: processes that share the work; each embeds its batches.

    Returns:
        The embeddings in the order of the split on the main rank, None on the others.

    Raises:
        UserError: no image is readable, or an embedding is not finite.
    """
    vectors, rows = [], []
    with tqdm(
        total=len(paths),
        desc=name,
        unit="img",
        disable=None if progress and ranks.is_main else True,
        leave=False,
    ) as bar:
        for out, of_batch in embedded_batches(encoder, loader, mean=mean, std=std, device=device, dtype=dtype):
            vectors.append(out)
            rows.append(of_batch)
            bar.update(len(of_batch) * ranks.world_size)
    loader.agree()
    # Copied to the CPU once at the end, so that no batch waits for the device.
    own_vectors = torch.cat(vectors).float().cpu() if vectors else torch.empty(0, encoder.embed_dim)
    all_vectors = ranks.host.gather_rows(own_vectors)
    all_rows = ranks.host.gather_rows(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64))
    embeddings = None if all_vectors is None else Embeddings(all_vectors, all_rows)
    ranks.host.run_on_main(lambda: _check(embeddings, paths, name))
    return embeddings


def embedded_batches(
    encoder: Encoder,
    loader: EvalLoader,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, D) embeddings on the device and (B,) int64 rows of each batch; arguments as for `embed`.

    The loader is closed and the encoder's mode restored at the end. Nothing waits for the device.
    """
    training = encoder.training
    encoder.eval()
    try:
        for batch in loader:
            with torch.inference_mode():
                images = normalize(batch.images, mean, std, dtype)
                with autocast(dtype, device):
                    out = encoder(images)
            yield out[: batch.valid], torch.as_tensor(batch.indices[: batch.valid], dtype=torch.int64)
    finally:
        encoder.train(training)
        loader.close()


def _check(embeddings: Embeddings, paths: Sequence[str], name: str) -> None:
    if not len(embeddings.rows):
        raise UserError(f"{name}: no image could be read")
    broken = ~torch.isfinite(embeddings.vectors).all(dim=1)
    if broken.any():
        first = paths[int(embeddings.rows[broken][0])]
        raise UserError(
            f"{name}: {int(broken.sum())} embeddings are not finite, the first of {first}: "
            "check the weights, or try --precision fp32"
        )
