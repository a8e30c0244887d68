"""Options, their presets and flags, and what is checked before anything starts."""

from fastirt.config.options import Config

__all__ = ["Config"]
