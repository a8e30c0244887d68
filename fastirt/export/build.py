"""`export`: a folder made from a run, complete and proved, or not made at all."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

from fastirt.errors import UserError
from fastirt.export.card import files_table, latency_table, write_card, write_report
from fastirt.export.new_folder import REPORT, check_place, new_folder
from fastirt.export.options import MAX_DIFFERENCE, ExportOptions
from fastirt.export.push import check_name, upload
from fastirt.export.source import Source, open_source
from fastirt.export.timm_folder import check_timm_folder, plain_call, write_timm_folder
from fastirt.inference.model import Model

log = logging.getLogger("fastirt")


def export(
    run: str | os.PathLike[str] | Model,
    out: str | os.PathLike[str],
    *,
    onnx: bool = False,
    timm: bool = False,
    fp16: bool = False,
    int8: bool = False,
    push: Optional[str] = None,
    licence: Optional[str] = None,
    overwrite: bool = False,
    max_difference: float = MAX_DIFFERENCE,
    max_loss: Optional[float] = None,
    dataset: Optional[str] = None,
    data_path: Optional[str] = None,
    packed: Optional[str] = None,
    device: Optional[str] = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Export a model to `out`, with the proof that the files give the run's own descriptors.

    Args:
        run: a run's folder, a model file or a model of timm, or what `fastirt.load` returned.
        out: folder to make.
        onnx: model.onnx (images in) and encoder.onnx (normalized pixels in); with neither this nor
            `timm`, both are made. fp16 and int8 imply it.
        timm: config.json and model.safetensors, for `timm.create_model("local-dir:OUT")`.
        fp16: also in fp16.
        int8: also in int8.
        push: USER/NAME on the Hugging Face Hub, to upload the folder to.
        licence: for the card.
        overwrite: replace an earlier export.
        max_difference: points by which the fp32 file's Recall@1 may differ from torch's.
        max_loss: points of Recall@1 that fp16 and int8 may lose; None: any.
        dataset: of the proof, instead of the run's, as `fastirt train` takes it.
        data_path: likewise, its folder or file.
        packed: likewise, the file of its packed images.
        device: of torch; default: a GPU if there is one.
        progress: show progress bars.

    Returns:
        What is in export.json: sizes, cosines, Recall@1 and latencies of the files.

    Raises:
        UserError: a file differs from the encoder by more than is allowed, the model cannot be
            exported, images or packages are missing, or `out` exists.
    """
    everything = not (onnx or timm or fp16 or int8)
    options = ExportOptions(
        onnx=onnx or fp16 or int8 or everything,
        timm=timm or everything,
        fp16=fp16,
        int8=int8,
        push=push,
        licence=licence,
        overwrite=overwrite,
        max_difference=max_difference,
        max_loss=max_loss,
    )
    place = Path(os.path.realpath(out))  # the folder of a link, not the link, is replaced
    check_place(place, overwrite)
    if push is not None:
        check_name(push)
    if options.onnx:
        _check_packages()
    flags = {"dataset": dataset, "data_path": data_path, "packed": packed, "device": device}
    source = open_source(run, {name: str(value) for name, value in flags.items() if value is not None})
    with new_folder(place, overwrite) as folder:
        report = _fill(source, Path(out), folder, options, progress)
    if push is not None:
        report["url"] = upload(place, push)
    return report


def describe(report: dict[str, Any], out: Path) -> str:
    """What `fastirt export` prints."""
    lines = []
    if report["files"]:
        lines += [files_table(report), f"torch: Recall@1 {report['recall']:.2f} %", ""]
        lines += [f"milliseconds an image, {report['machine']}", latency_table(report), ""]
    if "timm" in report:
        lines.append(
            f'timm.create_model("local-dir:{out}", pretrained=True, num_classes=0): worst cosine '
            f"{report['timm']['own_transform']:.6f} with timm's transform, {report['timm']['same_pixels']:.6f} without"
        )
    lines.append(f"wrote {out}, with the card in {out}/README.md")
    return "\n".join([*lines, *([f"uploaded to {report['url']}"] if "url" in report else [])])


def _fill(source: Source, out: Path, folder: Path, options: ExportOptions, progress: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"model": source.config.model.model, "run": source.name, "files": {}}
    if options.timm:  # the shorter proof first
        write_timm_folder(source, folder)
        report["timm"] = check_timm_folder(source, folder)._asdict()
        if (call := plain_call(source)) is not None:
            log.warning("timm's own model(x) does not pool as this run does; the lines of the card do: %s", call)
    if options.onnx:
        from fastirt.export.onnx_graphs.files import write_onnx_files  # the extra

        report |= write_onnx_files(source, folder, options, progress)
    write_card(source, out, folder, options, report)
    write_report(folder / REPORT, report)
    return report


def _check_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"--onnx: needs {name}: pip install 'fastirt[export]'") from error
