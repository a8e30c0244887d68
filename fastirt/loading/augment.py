"""The random part of a training image's view: where it is cropped, whether it is flipped, and what
a function of the user does with it then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

from fastirt.config.random_streams import Purpose, stream
from fastirt.config.user_code import load_object, short_name, user_error
from fastirt.errors import UserError


@dataclass(frozen=True)
class Crops:
    """One draw for each position of a batch: x, y (B,) float64 in [0, 1), flip (B,) bool."""

    x: np.ndarray
    y: np.ndarray
    flip: np.ndarray

    def __getitem__(self, positions: slice) -> "Crops":
        return Crops(self.x[positions], self.y[positions], self.flip[positions])


def draw_crops(seed: int, step: int, batch_size: int) -> Crops:
    """Draws that are a function of (seed, step, position), whatever the batch size.

    Flips have p = 0.5.
    """
    draws = stream(seed, Purpose.CROPS, step).random((batch_size, 3))
    return Crops(draws[:, 0], draws[:, 1], draws[:, 2] < 0.5)


@dataclass
class Draws:
    """Random numbers of a user's augmentation, one row for each of its B images.

    Each call's numbers are a function of (seed, step, position in the batch of all ranks, how many
    calls came before), so that runs repeat, resume and scale over ranks.

    Attributes:
        seed, step: of the run and the training step.
        first, count: the positions of the B images in the batch of all ranks.
        device: where the numbers go.
    """

    seed: int
    step: int
    first: int
    count: int
    device: torch.device
    calls: int = 0

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1)."""
        return self._take(lambda stream, size: stream.random(size, dtype=np.float32), shape)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 of mean 0 and variance 1."""
        return self._take(lambda stream, size: stream.standard_normal(size, dtype=np.float32), shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 in [low, high)."""
        return self._take(lambda stream, size: stream.integers(low, high, size), shape)

    def _take(self, draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], shape: tuple) -> Tensor:
        # Rows of all positions up to the last one, so that none depends on how many there are.
        generator = stream(self.seed, Purpose.AUGMENT, self.step, self.calls)
        rows = draw(generator, (self.first + self.count, *shape))[self.first :]
        self.calls += 1
        numbers = torch.from_numpy(rows)
        if self.device.type == "cuda":  # page-locked: the host does not wait for the copy
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)


class OwnAugmentation:
    """`--augment FILE.py:NAME`: a function of the user between crop and normalization.

    NAME(images, draws) gets a rank's images (B, S, S, 3) uint8 on the device, cropped and flipped,
    and `Draws`; it returns as many of the same shape and type. It must treat each image by itself
    and draw all random numbers from `draws`; the first batch checks both.

    text: what the flag says. Raises UserError where it names no function.
    """

    def __init__(self, text: str, seed: int) -> None:
        self.function = load_object("--augment", text)
        if not callable(self.function):
            raise UserError(f"--augment {short_name(text)}: is no function")
        self.text, self.seed = text, seed
        self._is_checked = False

    def __call__(self, images: Tensor, step: int, first: int) -> Tensor:
        """(B, S, S, 3) uint8. step, first: of the batch, and the first image's position in it.

        Raises UserError for a result of another shape or type, and whatever the function raises.
        """
        draws = Draws(self.seed, step, first, len(images), images.device)
        if not self._is_checked:
            self._check(images, draws)
            self._is_checked = True
        return self._run(images, draws)

    def _run(self, images: Tensor, draws: Draws) -> Tensor:
        try:
            result = self.function(images, draws)
        except Exception as error:
            raise user_error("--augment", self.text, error) from error
        if not isinstance(result, Tensor) or (result.shape, result.dtype) != (images.shape, torch.uint8):
            found = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            raise self._refused(
                f"returned {found} for images {tuple(images.shape)} uint8: return the same shape and type, "
                "with .round().clamp(0, 255).to(torch.uint8) from floats"
            )
        if result.device != images.device:
            raise self._refused(f"returned images on {result.device} for images on {images.device}")
        return result

    def _check(self, images: Tensor, draws: Draws) -> None:
        """Raises UserError where two calls differ, or an image's result depends on the others."""
        whole = self._run(images.clone(), replace(draws))
        if not torch.equal(whole, self._run(images.clone(), replace(draws))):
            raise self._refused("two calls on the same images differ: draw all random numbers from its second argument")
        half = len(images) // 2
        rest = self._run(images[half:].clone(), replace(draws, first=draws.first + half, count=len(images) - half))
        # A level for arithmetic that rounds differently in a batch of another size.
        if (rest.short() - whole[half:].short()).abs().max() > 1:
            raise self._refused(
                "an image's result depends on the other images of the batch: on several ranks the batch is "
                "divided; treat each image by itself"
            )

    def _refused(self, reason: str) -> UserError:
        return UserError(f"--augment {short_name(self.text)}: {reason}")


def own_augmentation(text: Optional[str], seed: int) -> Optional[OwnAugmentation]:
    """The user's function, or None where `--augment` names none."""
    return None if text is None else OwnAugmentation(text, seed)
