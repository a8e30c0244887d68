"""The ONNX files of an export, each proved before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import onnx

from fastirt.errors import UserError
from fastirt.export import latency, proof
from fastirt.export.onnx_graphs.encoder import encoder_graph, image_graph, save
from fastirt.export.onnx_graphs.quantize import half, int8
from fastirt.export.options import ExportOptions
from fastirt.export.source import Source

CALIBRATION = 128  # training images that set the ranges of int8
# Between metrics.json and the weights in fp32: a decoder or bf16 moves a query or two.
MOVED_POINTS, MOVED_QUERIES = 1.0, 3


class _Variant(NamedTuple):
    """suffix: of its files' names. encoder, images: the graphs. way: how it was quantized."""

    suffix: str
    encoder: onnx.ModelProto
    images: onnx.ModelProto
    way: str = ""


def write_onnx_files(source: Source, folder: Path, options: ExportOptions, progress: bool) -> dict[str, Any]:
    """Write the files; returns what `export.json` says of them.

    Raises UserError for a file whose vectors or whose Recall@1 are not the encoder's.
    """
    import onnxruntime

    variants = _variants(source, options)
    known = proof.encoder_vectors(source, progress)
    recall = proof.recall_at_1(known, source)
    _check_metrics(source, recall, len(known[source.evaluated()[0].name].rows))
    sessions = {v.suffix + v.way: proof.session(v.images) for v in variants}
    found, by_pillow = proof.file_vectors(sessions, source, known, progress)
    recalls = {name: proof.recall_at_1(vectors, source) for name, vectors in found.items()}
    agreements = {name: proof.agreement(vectors, known, by_pillow, source) for name, vectors in found.items()}
    del sessions
    kept = _kept(variants, agreements)
    sample = proof.sample_pixels(source, source.evaluated()[0])
    files: dict[str, Any] = {}
    encoders = {}
    for variant in kept:
        key = variant.suffix + variant.way
        name, inner = f"model{variant.suffix}.onnx", f"encoder{variant.suffix}.onnx"
        save(variant.images, folder / name, source)
        save(variant.encoder, folder / inner, source)
        encoders[inner] = proof.session(str(folder / inner))
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "worst_cosine": agreements[key].worst,
            "worst_image": Path(agreements[key].worst_image).name,
            "mean_cosine": agreements[key].mean,
            "recall": recalls[key],
            "difference": recalls[key] - recall,
            **({"quantized": variant.way} if variant.way else {}),
        }
        files[inner] = {
            "bytes": (folder / inner).stat().st_size,
            "worst_cosine": proof.pixel_agreement(encoders[inner], sample, source, known),
        }
        _check(variant, files, agreements[key], recall, options)
    return {
        "files": files,
        "recall": recall,
        "queries": len(known[source.evaluated()[0].name].rows),
        "gallery": len(known[source.evaluated()[-1].name].rows),
        "metrics": proof.metrics(known, source),
        "latency": latency.latencies(encoders, source),
        "machine": latency.machine(source.device),
        "onnxruntime": onnxruntime.__version__,
        "format": f"opset {kept[0].images.opset_import[0].version}, IR {kept[0].images.ir_version}",
        "int8": {v.way: recalls[v.suffix + v.way] for v in variants if v.way},
        "note": _note(variants, kept, recalls, agreements[""]),
    }


def _variants(source: Source, options: ExportOptions) -> list[_Variant]:
    encoder = encoder_graph(source.encoder)
    graphs = {("", ""): encoder}
    if options.fp16:
        graphs["_fp16", ""] = half(encoder)
    if options.int8:
        train = source.catalog.train
        calibration = None if train is None else proof.sample_pixels(source, train, CALIBRATION)[0]
        graphs |= {("_int8", way): model for way, model in int8(encoder, calibration).items()}
    return [_Variant(suffix, graph, image_graph(graph, source), way) for (suffix, way), graph in graphs.items()]


def _kept(variants: list[_Variant], agreements: dict[str, proof.Agreement]) -> list[_Variant]:
    """One variant of each suffix: of the ways of int8 the one whose vectors stay nearest.

    Not the one of the better Recall@1: chosen by the test, it would no longer measure the file.
    """

    def nearness(variant: _Variant) -> float:
        return agreements[variant.suffix + variant.way].mean

    suffixes = dict.fromkeys(variant.suffix for variant in variants)
    return [max((v for v in variants if v.suffix == suffix), key=nearness) for suffix in suffixes]


def _check_metrics(source: Source, recall: float, queries: int) -> None:
    """Raises UserError if the card would hold results that are not those of these weights."""
    if "recall@1" not in source.metrics:
        return
    measured = 100 * source.metrics["recall@1"]
    if not abs(measured - recall) <= max(MOVED_POINTS, 100 * MOVED_QUERIES / queries):
        raise UserError(
            f"{source.name}: Recall@1 in its metrics.json {measured:.2f} %, of its weights {recall:.2f} %: one of the "
            "two was changed: not exported; `fastirt evaluate` measures the weights again"
        )


def _check(
    variant: _Variant, files: dict[str, Any], agreement: proof.Agreement, recall: float, options: ExportOptions
) -> None:
    name, inner = f"model{variant.suffix}.onnx", f"encoder{variant.suffix}.onnx"
    file = files[name]
    values = f"{name}: Recall@1 {file['recall']:.2f} %, torch {recall:.2f} %: {abs(file['difference']):.2f} points"
    if variant.suffix:
        if options.max_loss is not None and not -file["difference"] <= options.max_loss + 1e-9:
            raise UserError(f"{values} lost, --max-loss {options.max_loss:g} allows less")
        return
    if not abs(file["difference"]) <= options.max_difference + 1e-9:  # also for a limit of NaN
        raise UserError(f"{values} apart, --max-difference {options.max_difference:g} allows less")
    for what, cosine, least in (
        (f"{name}: {agreement.worst_image}", agreement.worst, proof.MIN_COSINE),
        (f"{name}: an image that Pillow resizes", agreement.worst_pillow, proof.MIN_PILLOW_COSINE),
        (inner, files[inner]["worst_cosine"], proof.MIN_COSINE),
    ):
        if not cosine >= least:
            raise UserError(f"{what}: cosine {cosine:.6f} with torch's vector, less than {least}: not exported")


def _note(variants: list[_Variant], kept: list[_Variant], recalls: dict[str, float], agreement: proof.Agreement) -> str:
    """For the card: the other way of int8, and images that are compared less strictly."""
    sentences = ["Those of `encoder` files are of a sample of queries."]
    chosen = {v.way for v in kept}
    for variant in variants:
        if variant.way and variant.way in chosen:
            sentences.append(f"int8: weights by channel, activations {variant.way}.")
        elif variant.way:
            sentences.append(f"With {variant.way} activations: Recall@1 {recalls[variant.suffix + variant.way]:.2f} %.")
    if agreement.pillow:
        sentences.append(
            f"{agreement.pillow:,} images that the run reads through Pillow, which resizes slightly otherwise, are "
            f"left out of the worst cosine: theirs is {agreement.worst_pillow:.6f}."
        )
    return " ".join(sentences)
