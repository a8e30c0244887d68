"""Pictures of a split to embeddings."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from tqdm import tqdm

from fastirt.config import Config
from fastirt.encoder import Encoder
from fastirt.errors import UserError
from fastirt.input.loader import EvalLoader
from fastirt.input.normalise import normalise
from fastirt.step import autocast


class Embeddings(NamedTuple):
    """vectors (N, D) float32 on the CPU, of length 1; rows (N,) int64: their rows of the split (unreadable pictures are left out)."""

    vectors: Tensor
    rows: Tensor


def normalization_constants(config: Config, encoder: Encoder) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of pictures in [0, 1]: the model's own, or ImageNet's."""
    if config.input.normalization == "imagenet":
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return encoder.mean, encoder.std


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
) -> Embeddings:
    """Embed everything that `loader` yields, in evaluation mode; the encoder's mode is restored.

    dtype: of the encoder's matrix products (bfloat16: autocast). Raises UserError for an embedding that is not finite.
    """
    training = encoder.training
    encoder.eval()
    vectors, rows = [], []
    try:
        with (
            torch.inference_mode(),
            tqdm(total=len(paths), desc=name, unit="img", disable=None if progress else True, leave=False) as bar,
        ):
            for batch in loader:
                images = normalise(batch.images, mean, std, dtype)
                with autocast(dtype, device):
                    out = encoder(images)
                vectors.append(out[: batch.valid])
                rows.append(torch.as_tensor(batch.indices[: batch.valid], dtype=torch.int64))
                bar.update(batch.valid)
    finally:
        encoder.train(training)
        loader.close()
    if not vectors:
        raise UserError(f"{name}: no picture could be read")
    found = Embeddings(
        torch.cat(vectors).float().cpu(), torch.cat(rows)
    )  # one copy: one per batch would stall a GPU each time
    broken = ~torch.isfinite(found.vectors).all(dim=1)
    if broken.any():
        first = paths[int(found.rows[broken][0])]
        raise UserError(
            f"{name}: {int(broken.sum())} embeddings are not finite, the first of {first}: check the weights, or try --precision fp32"
        )
    return found
