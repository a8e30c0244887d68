"""The DALI decoder: encoded images to a uint8 batch, one graph for CPU and GPU.

For images that `prepare` returns, decoding and turning upright on a CPU are bit-identical to
Pillow. The resize differs because DALI does not round to uint8 between its two directions: 0.18 of
255 levels on average. Rounding there needs two resizes, which halves the speed on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np
import torch

from fastirt.images.decoders import pil
from fastirt.images.formats.header_check import Undecodable
from fastirt.images.formats.structure import complaint

# All supported JPEGs go to the GPU's hardware decoder. With a smaller share, the batch would decide
# which of two decoders reads an image. Their pixels differ slightly, so results would depend on the
# cache and on the number of ranks.
HW_DECODER_LOAD = 1.0


class Kind(NamedTuple):
    """The steps of a pipeline."""

    resize: bool  # False: the whole batch has its final size already
    crop: bool


class DaliDecoder:
    """A `Decoder` by NVIDIA DALI.

    Args:
        size: side S of the crops in pixels.
        batch_size: largest number of images per call.
        threads: CPU threads of DALI.
        device: where images are decoded and returned.
        hw_decoder_load: share of a batch for the GPU's JPEG decoder.
        orientation: "exif" turns images upright, "stored" does not.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        threads: int,
        device: torch.device,
        hw_decoder_load: float = HW_DECODER_LOAD,
        orientation: str = "stored",
    ) -> None:
        check_dali()  # here, because the decoding thread must not be the first to import DALI
        self.size, self.batch_size, self.threads, self.device = size, batch_size, threads, device
        self.hw_decoder_load, self.orientation = hw_decoder_load, orientation
        self._pipelines: dict[Kind, Any] = {}  # built on first use

    def decode(
        self,
        encoded: Sequence[np.ndarray],
        sizes: np.ndarray,
        resized: np.ndarray,
        corners: np.ndarray,
        flips: np.ndarray,
    ) -> torch.Tensor:
        """As `Decoder.decode`. On a CPU the tensor shares DALI's memory and keeps it alive."""
        fed = {"corner": corners.astype(np.int32), "flip": flips.astype(np.int32)}
        batch = self._decode(True, encoded, sizes, resized, fed)
        # Copied on a GPU: the consumer may still read the batch when DALI reuses its buffer.
        images = torch.from_dlpack(batch.as_tensor())
        return images if self.device.type == "cpu" else self._finished([images])[0]

    def decode_whole(self, encoded: Sequence[np.ndarray], sizes: np.ndarray, resized: np.ndarray) -> list[torch.Tensor]:
        """As `Decoder.decode_whole`, on the device."""
        batch = self._decode(False, encoded, sizes, resized, {})
        return self._finished([torch.from_dlpack(batch[i]) for i in range(len(encoded))])

    def close(self) -> None:
        self._pipelines.clear()

    def _decode(
        self,
        crop: bool,
        encoded: Sequence[np.ndarray],
        sizes: np.ndarray,
        resized: np.ndarray,
        fed: dict[str, np.ndarray],
    ) -> Any:
        kind = Kind(not np.array_equal(sizes, resized), crop)
        if kind.resize:
            fed = {**fed, "size": resized.astype(np.float32)}
        if kind not in self._pipelines:
            self._pipelines[kind] = self._build(self.batch_size, kind)
        try:
            return self._run(self._pipelines[kind], encoded, fed)
        except RuntimeError as error:
            # The pipeline is unusable now and its message names at most one image: try each alone.
            del self._pipelines[kind]
            failed = self._find_undecodable(kind, encoded, fed)
            if not failed:
                raise error
            raise Undecodable(failed) from None

    def _find_undecodable(
        self, kind: Kind, encoded: Sequence[np.ndarray], fed: dict[str, np.ndarray]
    ) -> dict[int, str]:
        failed, single = {}, self._build(1, kind)
        for i in range(len(encoded)):
            try:
                self._run(single, encoded[i : i + 1], {name: value[i : i + 1] for name, value in fed.items()})
            except RuntimeError:
                failed[i] = _explain(encoded[i])
                single = self._build(1, kind)
        return failed

    def _run(self, pipeline: Any, encoded: Sequence[np.ndarray], fed: dict[str, np.ndarray]) -> Any:
        pipeline.feed_input("encoded", list(encoded))
        for name, value in fed.items():
            pipeline.feed_input(name, value)
        (batch,) = pipeline.run() if self.device.type == "cpu" else pipeline.run(torch.cuda.current_stream(self.device))
        return batch

    def _finished(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """Completed copies that outlive DALI's buffers."""
        images = [image.clone() for image in images]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return images

    def _build(self, batch_size: int, kind: Kind):
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
            decoded = fn.decoders.image(
                fn.external_source(name="encoded"),
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=self.orientation == "exif",
                **(dict(hw_decoder_load=self.hw_decoder_load, jpeg_fancy_upsampling=True) if gpu else {}),
            )
            if kind.resize:
                size = fn.external_source(name="size")
                decoded = fn.resize(
                    decoded, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
                )
            if kind.crop:
                square = [self.size, self.size]
                decoded = fn.slice(decoded, start=fn.external_source(name="corner"), shape=square, axes=[0, 1])
                decoded = fn.flip(decoded, horizontal=fn.external_source(name="flip"))
            pipeline.set_outputs(decoded)
        pipeline.build()
        return pipeline


def check_dali() -> None:
    """Raises any exception if DALI cannot be imported."""
    import nvidia.dali  # noqa: F401


def _explain(encoded: np.ndarray) -> str:
    """Why an image cannot be decoded: Pillow's message if Pillow fails too."""
    try:
        pil.decode(encoded)
    except Exception as error:
        return complaint(error)
    return "cannot be decoded by DALI"
