"""What an export contains, and what it may lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

IMAGES, PIXELS, VECTORS = "images", "pixels", "vectors"  # inputs and outputs of the ONNX graphs
MAX_DIFFERENCE = 0.1  # points of Recall@1, of the fp32 file from torch


@dataclass(frozen=True)
class ExportOptions:
    """Attributes are the flags of `fastirt export`.

    Attributes:
        onnx: write model.onnx and encoder.onnx.
        timm: write the folder that timm loads.
        fp16: add both ONNX files in fp16.
        int8: add both ONNX files in int8.
        push: USER/NAME on the Hugging Face Hub to upload to.
        licence: of the model, for the card.
        overwrite: replace an earlier export.
        max_difference: points by which the fp32 file's Recall@1 may differ from torch's.
        max_loss: points of Recall@1 that fp16 and int8 may lose; None: any.
    """

    onnx: bool = True
    timm: bool = True
    fp16: bool = False
    int8: bool = False
    push: Optional[str] = None
    licence: Optional[str] = None
    overwrite: bool = False
    max_difference: float = MAX_DIFFERENCE
    max_loss: Optional[float] = None
