"""An augmentation of your own: other brightness and saturation, and a gray rectangle.

fastirt train --augment scripts/examples/own_augmentation.py:jitter …

Each random number comes from `draws`, one row for each image, so that the run repeats and resumes.
"""

import torch


def jitter(images, draws):
    """images: (B, S, S, 3) uint8, cropped and flipped; returns the same shape and type."""
    pixels, side = images.float(), images.shape[1]
    brightness, saturation = (0.7 + 0.6 * draws.uniform(2, 1, 1, 1)).unbind(1)
    gray = pixels.mean(3, keepdim=True)
    pixels = (gray + saturation * (pixels - gray)) * brightness
    # up to half of each side, in every other image
    first, length = draws.uniform(2, 1) * side, draws.uniform(2, 1) * side / 2
    place = torch.arange(side, device=images.device)
    rows, columns = ((place >= first) & (place < first + length)).unbind(1)
    erased = rows[:, :, None] & columns[:, None] & (draws.uniform(1, 1) < 0.5)
    pixels = torch.where(erased[..., None], 128.0, pixels)
    return pixels.round().clamp(0, 255).to(torch.uint8)
