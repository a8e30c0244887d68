"""What is read out of a run on a fake GPU: metrics, the profiler's marks, counts for ranks; and
DALI's arguments.

`python -m tests.fake_cuda.run readout_proof [CASE ...]`
"""

from __future__ import annotations

from typing import Any, Callable
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.fake_cuda import events
from benchmarks.fake_cuda.fake_tensors import is_locked
from benchmarks.fake_cuda.streams import host_waits
from fastirt.kernels import count_similarities
from fastirt.kernels.gates import texts
from fastirt.step.async_metrics import AsyncMetrics
from fastirt.step.step_counters import LOSS_NAMES
from fastirt.step.train_step import PHASES
from fastirt.training.profiler import Marks
from tests.fake_cuda.cases import print_faults
from tests.fake_cuda.step_proof import CUDA, LAUNCHES, batch_of, fake_step
from tests.fake_cuda.watch import Watch

SIDE = 32  # of DALI's crops


def _value(self: torch.Tensor) -> int:
    """Host memory has a value at once; a CUDA tensor's must be waited for."""
    if self.is_cuda:
        raise AssertionError("the host waits for a value")
    return 0


def _values(self: torch.Tensor) -> list[float]:
    return [float(_value(self))] * self.numel()


def metrics() -> list[str]:
    """Losses are copied to page-locked memory, and read once an event says that they are there."""
    with FakeTensorMode(), Watch() as watch:
        step = fake_step(engine="eager", precision="bf16")
        readout, batches = AsyncMetrics(step.counters), [batch_of(number) for number in range(3)]
        watch.faults.clear(), watch.uploads.clear(), events.clear()
        with (
            mock.patch.object(FakeTensor, "__int__", _value),
            mock.patch.object(FakeTensor, "tolist", _values),
        ):
            for batch in batches:
                step(batch)
                readout.first_bad_step()
            if readout.poll() is not None:
                return ["a row came without a request"]
            readout.request({"step": 3})
            row = readout.poll()
    copies = [copy for copy in watch.uploads if "step/async_metrics.py" in copy]
    faults = watch.faults + host_waits()
    if len(copies) != 4 or not all("cuda to cpu" in copy for copy in copies):
        faults.append(f"copies: {copies}")
    if row is None or set(row) != {"step", *LOSS_NAMES}:
        faults.append(f"the row is {row}")
    if [event[0] for event in events].count("record") != 1:
        faults.append("no event after the copy")
    if not is_locked(readout._sums) or readout._sums.dtype != torch.float64:
        faults.append("the sums are not copied to page-locked float64")
    return faults


def marks(engine: str) -> list[str]:
    """Each phase is marked by an event in order; in a capture by one that stays readable."""
    faults: list[str] = []
    captured = engine == "graph"
    with FakeTensorMode():
        step = fake_step(engine=engine, precision="bf16")
        step.on_phase_end = marks = Marks(CUDA, captured)
        for number in range(step.engine.capture.warm_up if captured else 1):
            step(batch_of(number))
        events.clear()
        step(batch_of(4))  # with the graph engine: captured, then replayed
        if len(waits := host_waits()) != captured:
            faults.append(f"waits within the step: {waits}")
        recorded = [event for event in events if event[0] in ("record", "capture begins", "capture ends", "replay")]
        kinds = [event[0] for event in recorded]
        expected = ["record"] * (1 + len(PHASES))
        if captured:
            expected = ["record", "capture begins", *["record"] * len(PHASES), "capture ends", "replay"]
        if kinds != expected:
            faults.append(f"{kinds} instead of {expected}")
        if captured and {event[2] for event in recorded[2:-2]} != {recorded[1][1]}:
            faults.append("an event of the capture is recorded on another stream")
        external = {phase: event.options.get("external") for phase, event in marks._step.items()}
        if external != {phase: captured and phase != "start" for phase in ("start", *PHASES)}:
            faults.append(f"external: {external}")
        events.clear()
        marks.read()
        if len(host_waits()) != 1 or set(marks.milliseconds()) != set(PHASES):
            faults.append(f"{host_waits()}, {marks.milliseconds()}")
    return faults


def dali() -> list[str]:
    """The arguments of DALI's GPU pipelines, up to `build`, which needs a device."""
    from nvidia.dali import Pipeline, fn, types

    from fastirt.images.decoders.dali import DaliDecoder, Kind

    faults: list[str] = []
    for orientation in ("exif", "stored"):
        decoder = DaliDecoder(SIDE, 4, 2, CUDA, orientation=orientation)
        for kind in (Kind(resize, crop) for resize in (False, True) for crop in (False, True)):
            called: dict[str, dict[str, Any]] = {}
            with (
                mock.patch.object(fn.decoders, "image", _recorded(called, "image", fn.decoders.image)),
                mock.patch.object(fn, "resize", _recorded(called, "resize", fn.resize)),
                mock.patch.object(fn, "slice", _recorded(called, "slice", fn.slice)),
                mock.patch.object(fn, "flip", _recorded(called, "flip", fn.flip)),
                mock.patch.object(Pipeline, "build", lambda self: None),
            ):
                pipeline = decoder._build(4, kind)
            expected: dict[str, dict[str, Any]] = {
                "image": dict(
                    device="mixed",
                    output_type=types.RGB,
                    adjust_orientation=orientation == "exif",
                    hw_decoder_load=1.0,
                    # else the GPU decodes 4:2:0 JPEGs otherwise than the CPU, where colors change
                    jpeg_fancy_upsampling=True,
                )
            }
            if kind.resize:
                expected["resize"] = dict(interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8)
            if kind.crop:
                expected |= {"slice": dict(shape=[SIDE, SIDE], axes=[0, 1]), "flip": {}}
            if called != expected:
                faults.append(f"{kind}: {called} instead of {expected}")
            if (pipeline.device_id, pipeline.max_batch_size, pipeline.num_threads) != (0, 4, 2):
                faults.append(f"{kind}: device {pipeline.device_id}")
    return faults


def counts() -> list[str]:
    """Operands, launch and result of SOP's counts are queued; the launch compiles as `aot` says."""
    LAUNCHES.clear()
    with FakeTensorMode(), Watch() as watch:
        vectors, thresholds = torch.empty(60502, 384, device=CUDA), torch.empty(60502, 11, device=CUDA)
        found = count_similarities(vectors, vectors, thresholds, thresholds)
    faults = watch.faults + host_waits()
    if [(value.shape, value.dtype, value.device) for value in found] != [((60502, 11), torch.int32, CUDA)] * 2:
        faults.append(f"the result is {found}")
    (launch,) = LAUNCHES
    if launch.grid != (473, 5, 1):  # 16 programs and more for each of 132 multiprocessors
        faults.append(f"the grid is {launch.grid}")
    compiled = launch.compiled()
    if "wgmma" not in compiled.asm["ptx"] or texts.waits_in_loops(compiled.asm["ttgir"]) != [8]:
        faults.append("no wgmma, or the next slices are not loaded ahead")
    return faults


def _recorded(called: dict[str, dict[str, Any]], name: str, function: Callable) -> Callable:
    def call(*args: Any, **options: Any) -> Any:
        out = function(*args, **options)
        called[name] = {key: value for key, value in options.items() if type(value).__name__ != "DataNode"}
        if "_gpu" not in type(out).__name__ and out.device != "gpu":
            called[name]["device of the result"] = out.device
        return out

    return call


CASES: dict[str, Callable[[], list[str]]] = {
    "metrics": metrics,
    "marks, eager": lambda: marks("eager"),
    "marks, graph": lambda: marks("graph"),
    "dali": dali,
    "counts": counts,
}


def main(names: list[str]) -> None:
    print_faults(CASES, names)
