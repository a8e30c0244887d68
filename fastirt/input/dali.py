"""The DALI pipeline: encoded pictures to a uint8 batch, one graph for CPU and GPU.

Decoding is bit-identical to PIL's. The resize of the exact source window differs from PIL's only in that nothing is rounded to
uint8 between its two directions: 0.18 of 255 levels on average. Rounding there as well needs two resizes, which halves the speed on a CPU.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from fastirt.input import pil
from fastirt.input.check import Undecodable

HW_DECODER_LOAD = 0.65  # share of JPEGs that the GPU's hardware decoder takes; tune it to the number of CPU threads


class DaliDecoder:
    """Encoded pictures and their source windows to a batch on `device`, at most `batch_size` at a time."""

    def __init__(
        self, size: int, batch_size: int, threads: int, device: torch.device, hw_decoder_load: float = HW_DECODER_LOAD
    ) -> None:
        self.size, self.batch_size, self.threads, self.device = size, batch_size, threads, device
        self.hw_decoder_load = hw_decoder_load
        self._pipeline = self._build(batch_size)

    def decode(self, encoded: Sequence[np.ndarray], windows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the device; windows (B, 4) as `source_windows` gives them, flips (B,) bool. Raises Undecodable.

        The tensor shares DALI's memory and keeps it alive. On a GPU the batch is ready when this returns.
        """
        try:
            return self._run(self._pipeline, encoded, windows, flips)
        except RuntimeError as error:
            # The pipeline is dead now, and its message names one picture at most: try each alone.
            self._pipeline = self._build(self.batch_size)
            failed = self._find(encoded, windows, flips)
            if not failed:
                raise error
            raise Undecodable(failed) from None

    def close(self) -> None:
        self._pipeline = None

    def _find(self, encoded: Sequence[np.ndarray], windows: np.ndarray, flips: np.ndarray) -> dict[int, str]:
        failed, single = {}, self._build(1)
        for i in range(len(encoded)):
            try:
                self._run(single, encoded[i : i + 1], windows[i : i + 1], flips[i : i + 1])
            except RuntimeError:
                failed[i] = _explain(encoded[i])
                single = self._build(1)
        return failed

    def _run(self, pipeline, encoded: Sequence[np.ndarray], windows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        top, left, bottom, right = windows.astype(np.float32).T
        first, last = (
            np.where(flips, right, left),
            np.where(flips, left, right),
        )  # a window from right to left is a flip
        pipeline.feed_input("encoded", list(encoded))
        pipeline.feed_input("start", np.stack([top, first], 1))
        pipeline.feed_input("end", np.stack([bottom, last], 1))
        if self.device.type == "cpu":
            (batch,) = pipeline.run()
            return torch.from_dlpack(batch.as_tensor())
        stream = torch.cuda.current_stream(self.device)
        (batch,) = pipeline.run(stream)
        # Copied into torch's own memory: the consumer's stream may still read it when DALI wants its buffer back.
        images = torch.from_dlpack(batch.as_tensor()).clone()
        stream.synchronize()
        return images

    def _build(self, batch_size: int):
        from nvidia.dali import Pipeline, fn, types

        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with pipeline:
            pictures = fn.decoders.image(
                fn.external_source(name="encoded"),
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **(dict(hw_decoder_load=self.hw_decoder_load) if gpu else {}),
            )
            views = fn.resize(
                pictures,
                size=[self.size, self.size],
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                dtype=types.UINT8,
                roi_start=fn.external_source(name="start"),
                roi_end=fn.external_source(name="end"),
            )
            pipeline.set_outputs(views)
        pipeline.build()
        return pipeline


def _explain(encoded: np.ndarray) -> str:
    """Why a picture cannot be decoded, in PIL's words where it fails there too."""
    try:
        pil.decode(encoded)
    except Exception as error:
        return pil.reason(error)
    return "cannot be decoded by DALI"
