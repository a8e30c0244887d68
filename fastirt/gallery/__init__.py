"""Galleries that are searched by image: `Gallery.build`, `Gallery.open`."""

from fastirt.gallery.gallery import Gallery
from fastirt.gallery.rows import Neighbors

__all__ = ["Gallery", "Neighbors"]
