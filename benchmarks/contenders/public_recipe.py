"""The public re-implementation's recipe, written anew from its description: the peer that fastirt is timed against.

PIL and torchvision in a DataLoader; an eager fp32 step with pytorch-metric-learning's contrastive loss against the batch and a
cross-batch memory, KoLeo on its own, AdamW. Without that package, the same loss in plain torch; `recipe_name` then says so.
"""

from __future__ import annotations

import copy
import os
from typing import Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms


class Pictures(Dataset):
    """(3, S, S) float32 and label of each picture."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], size: int, resize: int) -> None:
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
    """Workers or threads that decode, for every contender alike: as many as `fastirt train` takes by default."""
    return min(16, len(os.sched_getaffinity(0)))


def loader(
    paths: Sequence[str], labels: Sequence[int], batch_size: int, workers: int, size: int = 224, resize: int = 256
) -> DataLoader:
    """Random batches (B, 3, S, S) float32 with labels (B,), decoded by `workers` processes, without end: a small set is not paused
    at the end of each epoch, as a large one hardly is."""
    pictures = Pictures(paths, labels, size, resize)
    return DataLoader(
        pictures, batch_size, sampler=RandomSampler(pictures, replacement=True, num_samples=10**9), drop_last=True,
        num_workers=workers, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
    )  # fmt: skip


def has_metric_learning() -> bool:
    try:
        import pytorch_metric_learning.losses  # noqa: F401
    except ImportError:
        return False
    return True


def recipe_name() -> str:
    """Of its figures."""
    return "public recipe" if has_metric_learning() else "public recipe (own contrastive)"


def contrastive_loss(margin: float) -> Callable[..., Tensor]:
    """(embeddings, labels, ref_emb=None, ref_labels=None) -> loss, of pytorch-metric-learning where that is installed."""
    if not has_metric_learning():
        return OwnContrastive(margin)
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss

    return ContrastiveLoss(pos_margin=1, neg_margin=margin, distance=CosineSimilarity())


class OwnContrastive:
    """pytorch-metric-learning's ContrastiveLoss on cosine similarities, by its defaults: the mean of the positives' losses that are not
    zero, and that of the negatives'."""

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
    """One training step as its users run it; calling it returns the loss, for which it waits, as logging does there.

    encoder: a timm model without a classifier, its CLS token is the descriptor. memory: slots of the cross-batch memory, 0 for none.
    """

    def __init__(
        self,
        encoder: nn.Module,
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
        self.twin: Optional[nn.Module] = None
        if momentum is not None:
            self.twin = copy.deepcopy(self.encoder).requires_grad_(False)
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
                keys = embeddings if self.twin is None else self._embed(self.twin, images)
            self._enqueue(keys.detach(), labels)
            loss = loss + self.contrastive(
                embeddings, labels, ref_emb=self.memory[: self.filled], ref_labels=self.memory_labels[: self.filled]
            )
        loss = loss + self.lambda_reg * koleo(embeddings)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.twin is not None:
            with torch.no_grad():
                for key, query in zip(self.twin.parameters(), self.encoder.parameters()):
                    key.data = key.data * self.momentum + query.data * (1 - self.momentum)
        return loss.item()

    @staticmethod
    def _embed(encoder: nn.Module, images: Tensor) -> Tensor:
        return F.normalize(encoder.forward_features(images)[:, 0], dim=1)

    def _enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Over the oldest; a batch that overflows goes over the last slots, and the next begins at the first."""
        stop = self.head + len(keys)
        where = (
            slice(self.head, stop)
            if stop <= len(self.memory)
            else slice(len(self.memory) - len(keys), len(self.memory))
        )
        self.memory[where], self.memory_labels[where] = keys, labels
        self.filled = max(self.filled, where.stop)
        self.head = stop if stop < len(self.memory) else 0


def koleo(embeddings: Tensor) -> Tensor:
    """-mean log of the distance to the nearest other row, by the largest inner product."""
    with torch.no_grad():
        similarity = embeddings @ embeddings.T
        similarity.fill_diagonal_(-1)
        nearest = similarity.argmax(dim=1)
    return -torch.log(F.pairwise_distance(embeddings, embeddings[nearest], eps=1e-6) + 1e-8).mean()
