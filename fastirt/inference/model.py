"""A trained model to embed images with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastirt.config.options import Config
from fastirt.datasets.records import printable
from fastirt.distributed.device import choose_device
from fastirt.distributed.ranks import SINGLE_PROCESS, Ranks
from fastirt.errors import UserError
from fastirt.images.packed_store import PackedSplit
from fastirt.inference.image_list import ImageList
from fastirt.inference.list_loader import ListLoader, OnBad
from fastirt.inference.memory_source import MemorySource
from fastirt.inference.transform import Transform
from fastirt.model.encoder import Encoder, normalization_constants
from fastirt.model.precision import resolve_precision
from fastirt.model.save import description
from fastirt.model.weights.load import write_model
from fastirt.model.weights.timm_line import loading_line
from fastirt.retrieval.embed import embedded_batches

log = logging.getLogger("fastirt")

# Decide the embedding of an image up to rounding; decoder and precision do not belong to them.
PREPROCESSING = ("input_size", "resize", "resize_size", "orientation")


class Model:
    """An encoder with its preprocessing; `fastirt.load` makes one.

    Attributes:
        encoder: in evaluation mode, on `device`.
        config: options of model and input; the decoder and precision are those of the run.
        device: where `encode` works.
        engine: "eager" or "onednn": how `encoder` computes.
    """

    def __init__(self, encoder: Encoder, config: Config, device: torch.device, engine: str = "eager") -> None:
        self.encoder, self.config, self.device, self.engine = encoder.eval(), config, device, engine
        self._to(device)

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return self.encoder.embed_dim

    @functools.cached_property
    def transform(self) -> Transform:
        """PIL image to (3, S, S) float32, as evaluation resizes, crops and normalizes it."""
        return Transform(self.config.input, *normalization_constants(self.config, self.encoder))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of weights, architecture, pooling and preprocessing.

        Models of equal digest give equal vectors, up to the rounding of device, precision and
        decoder.
        """
        mean, std = normalization_constants(self.config, self.encoder)
        model = self.encoder.config
        described: dict[str, Any] = {name: getattr(self.config.input, name) for name in PREPROCESSING}
        described |= {"model": model.model, "model_kwargs": sorted(model.model_kwargs), "pooling": model.pooling}
        described |= {"eval_descriptor": model.eval_descriptor, "mean": list(mean), "std": list(std)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, value in sorted(self.encoder.vit.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(
        self,
        images: Any,
        batch_size: int = 64,
        device: Optional[str | torch.device] = None,
        progress: bool = False,
        on_bad: Optional[OnBad] = None,
    ) -> np.ndarray:
        """Embed images as the run's own evaluation does.

        Args:
            images: a folder (and all below it), an image file, a CSV file or a packed store; a list
                of paths, of PIL images or of (H, W, 3) uint8 arrays; one image; or an ImageList.
            batch_size: images at a time. No bit of a vector was seen to depend on it on a CPU.
            device: moves the model there first; None: where it is.
            progress: show a progress bar.
            on_bad: called with row, name and reason of each unreadable image; None: a warning.

        Returns:
            (N, D) float32, rows of length 1; NaN where an image is unreadable.

        Raises:
            UserError: no images, or vectors that are not finite.
        """
        listed = ImageList.of(images)
        if device is not None:
            self._to(choose_device(str(device)))
        vectors = np.full((len(listed), self.dim), np.nan, np.float32)
        loader = self.loader(listed, batch_size, on_bad or _warn)
        with tqdm(total=len(listed), unit="img", disable=not progress, leave=False) as bar:
            for found, rows in self.embedded(loader):
                self.check_finite(found, rows, listed)
                vectors[rows] = found
                bar.update(len(rows))
        return vectors

    def loader(self, images: ImageList, batch_size: int, on_bad: OnBad, ranks: Ranks = SINGLE_PROCESS) -> ListLoader:
        """Batches for `embedded`. Raises UserError for a packed store of other preprocessing."""
        source, input = images.source, self.config.input
        if isinstance(source, MemorySource):
            source.input = input
        if isinstance(source, PackedSplit):
            source.store.check_options(input.resize, input.resize_size, input.orientation)
        return ListLoader(source, batch_size, input, self.device, on_bad, ranks)

    def embedded(self, loader: ListLoader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(B, D) float32 vectors and (B,) int64 rows of the readable images of each batch."""
        mean, std = normalization_constants(self.config, self.encoder)
        dtype = resolve_precision(self.config.model.precision, self.device)
        batches = embedded_batches(self.encoder, loader, mean=mean, std=std, device=self.device, dtype=dtype)
        waiting: Optional[tuple[Any, Tensor]] = None
        for vectors, rows in batches:
            copied = _CopiedToHost(vectors)  # waited for after the next batch has been started
            if waiting is not None:
                yield waiting[0].array(), waiting[1].numpy()
            waiting = copied, rows
        if waiting is not None:
            yield waiting[0].array(), waiting[1].numpy()

    def check_finite(self, vectors: np.ndarray, rows: np.ndarray, images: ImageList) -> None:
        """Raises UserError for a vector of a readable image that is not finite."""
        broken = ~np.isfinite(vectors).all(axis=1)
        if broken.any():
            raise UserError(
                f"{images.names[rows[broken][0]]}: its vector is not finite: check the weights, or try --precision fp32"
            )

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file that `fastirt.load` and timm read; it has the same digest.

        Its metadata also names decoder and precision, so that on this machine the loaded model
        gives the same vectors to the last bit. Raises UserError if the file cannot be written.
        """
        described = dataclasses.replace(self.config, model=self.encoder.config)
        described = described.replace(input_size=self.encoder.input_size)
        numerics = {"loader": self.config.input.loader, "precision": self.config.model.precision}
        line = loading_line(self.encoder, Path(path))
        write_model(self.encoder.vit.state_dict(), Path(path), {**description(described), **numerics}, line)

    def _to(self, device: torch.device) -> None:
        if device.type != "cpu" and self.engine == "onednn":
            raise UserError(f"engine onednn: works on a CPU alone, not on {device}")
        self.encoder.to(device, memory_format=torch.channels_last)
        self.device = device


class _CopiedToHost:
    """A tensor on its way to the host, behind the work that is queued on its device."""

    def __init__(self, vectors: Tensor) -> None:
        self._event: Optional[torch.cuda.Event] = None
        self._host = vectors = vectors.float()
        if vectors.is_cuda:
            self._host = torch.empty(vectors.shape, pin_memory=True)
            self._host.copy_(vectors, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def array(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def _warn(row: int, name: str, reason: str) -> None:
    log.warning("bad image: %s: %s", printable(name), reason)
