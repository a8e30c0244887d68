"""The recipe of the public re-implementation, rewritten from its description: fastirt's main peer.

PIL and torchvision in a DataLoader; an eager fp32 step with pytorch-metric-learning's contrastive
loss against the batch and a cross-batch memory, a separate KoLeo, and AdamW. Without that package
the same loss in plain torch; `recipe_name` shows which of the two ran.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms


class Images(Dataset):
    """(3, S, S) float32 and label of each image."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | np.ndarray, size: int, resize: int) -> None:
        self.paths, self.labels = paths, labels
        self.transform = transforms.Compose(
            [
                transforms.Resize(resize, transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[row])


def cores() -> int:
    """Threads or processes that decode, in every contender: the default of `fastirt train`."""
    return min(16, len(os.sched_getaffinity(0)))


def loader(
    paths: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    batch_size: int,
    workers: int,
    size: int = 224,
    resize: int = 256,
) -> DataLoader:
    """Endless random batches (B, 3, S, S) float32 with labels (B,), decoded by `workers` processes.

    Endless because a small set would pause at the end of every short epoch, unlike a large one.
    """
    images = Images(paths, labels, size, resize)
    return DataLoader(
        images, batch_size, sampler=RandomSampler(images, replacement=True, num_samples=10**9), drop_last=True,
        num_workers=workers, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
    )  # fmt: skip


def has_metric_learning() -> bool:
    """Whether pytorch-metric-learning is installed."""
    try:
        import pytorch_metric_learning.losses  # noqa: F401
    except ImportError:
        return False
    return True


def recipe_name() -> str:
    """The name of the recipe's figures; it shows which contrastive loss ran."""
    return "public recipe" if has_metric_learning() else "public recipe (own contrastive)"


def contrastive_loss(margin: float) -> Callable[..., Tensor]:
    """(embeddings, labels, ref_emb=None, ref_labels=None) -> loss.

    pytorch-metric-learning's where it is installed, else OwnContrastive.
    """
    if not has_metric_learning():
        return OwnContrastive(margin)
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss

    return ContrastiveLoss(pos_margin=1, neg_margin=margin, distance=CosineSimilarity())


class OwnContrastive:
    """pytorch-metric-learning's ContrastiveLoss on cosine similarities, with its defaults: the mean
    over the nonzero losses of positives, plus the same of negatives."""

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def __call__(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Optional[Tensor] = None, ref_labels: Optional[Tensor] = None
    ) -> Tensor:
        rows = F.normalize(embeddings, dim=1)
        cols = rows if ref_emb is None else F.normalize(ref_emb, dim=1)
        similarity = rows @ cols.T
        same = labels[:, None] == (labels if ref_emb is None else ref_labels)[None, :]
        positive = same.clone().fill_diagonal_(False) if ref_emb is None else same
        return _mean_nonzero(F.relu(1 - similarity) * positive) + _mean_nonzero(
            F.relu(similarity - self.margin) * ~same
        )


def _mean_nonzero(losses: Tensor) -> Tensor:
    return losses.sum() / (losses > 0).sum().clamp(min=1)


class Recipe:
    """One training step of the recipe. A call returns the loss as a float, so it waits for the
    device, like the recipe's logging.

    encoder: a timm model without a classifier; its CLS token is the descriptor.
    memory: slots of the cross-batch memory, 0 for none.
    momentum: of a momentum encoder that fills the memory; None for no such encoder.
    """

    def __init__(
        self,
        encoder: Any,
        memory: int,
        device: torch.device,
        *,
        margin: float = 0.5,
        lambda_reg: float = 0.7,
        momentum: Optional[float] = None,
        lr: float = 3e-5,
    ) -> None:
        self.encoder, self.device = encoder.to(device).train(), device
        self.lambda_reg, self.momentum = lambda_reg, momentum
        self.momentum_encoder: Optional[nn.Module] = None
        if momentum is not None:
            self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.contrastive = contrastive_loss(margin)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=lr, weight_decay=5e-4)
        self.memory = torch.zeros(memory, encoder.num_features, device=device)
        self.memory_labels = torch.zeros(memory, dtype=torch.long, device=device)
        self.head, self.filled = 0, 0

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        """images (B, 3, S, S) float32, labels (B,), both on the device."""
        embeddings = self._embed(self.encoder, images)
        loss = self.contrastive(embeddings, labels)
        if len(self.memory):
            with torch.no_grad():
                keys = embeddings if self.momentum_encoder is None else self._embed(self.momentum_encoder, images)
            self._enqueue(keys.detach(), labels)
            loss = loss + self.contrastive(
                embeddings, labels, ref_emb=self.memory[: self.filled], ref_labels=self.memory_labels[: self.filled]
            )
        loss = loss + self.lambda_reg * koleo(embeddings)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.momentum_encoder is not None:
            with torch.no_grad():
                for key, query in zip(self.momentum_encoder.parameters(), self.encoder.parameters()):
                    key.data = key.data * self.momentum + query.data * (1 - self.momentum)
        return loss.item()

    @staticmethod
    def _embed(encoder: Any, images: Tensor) -> Tensor:
        return F.normalize(encoder.forward_features(images)[:, 0], dim=1)

    def _enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Replace the oldest slots. A batch that does not fit before the end of the memory replaces
        the last slots, and the next batch starts at the first."""
        stop = self.head + len(keys)
        slots = (
            slice(self.head, stop)
            if stop <= len(self.memory)
            else slice(len(self.memory) - len(keys), len(self.memory))
        )
        self.memory[slots], self.memory_labels[slots] = keys, labels
        self.filled = max(self.filled, slots.stop)
        self.head = stop if stop < len(self.memory) else 0


def koleo(embeddings: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest other row, found by the largest inner product."""
    with torch.no_grad():
        similarity = embeddings @ embeddings.T
        similarity.fill_diagonal_(-1)
        nearest = similarity.argmax(dim=1)
    return -torch.log(F.pairwise_distance(embeddings, embeddings[nearest], eps=1e-6) + 1e-8).mean()
