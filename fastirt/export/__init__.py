"""A run as files for others: ONNX and plain timm, each with the proof that it is the same model."""

from fastirt.export.build import export

__all__ = ["export"]
