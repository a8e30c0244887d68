"""Options, their presets and flags, and their checks."""

from fastirt.config.options import Config

__all__ = ["Config"]
