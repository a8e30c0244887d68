"""The model card, README.md of an exported folder, from a template and the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np

from fastirt import __version__
from fastirt.export.latency import BATCHES
from fastirt.export.options import ExportOptions
from fastirt.export.source import Source
from fastirt.export.timm_folder import IMAGE, opened_image, timm_lines
from fastirt.model.encoder import normalization_constants
from fastirt.retrieval.report import interval, markdown

TEMPLATE = Path(__file__).parent / "templates/card.md.jinja"
CURVE_ROWS = 10
POOLINGS = {
    "cls": "the CLS token",
    "mean": "the mean of the patch tokens",
    "max": "the maximum of the patch tokens in each dimension",
    "gem": "the generalized mean (power 3) of the patch tokens",
}
METHODS = {
    "irt-o": "It is the pretrained model off the shelf, not trained for this data.",
    "irt-l": "Trained with a contrastive loss (IRT_L of El-Nouby et al. 2021).",
    "irt-r": "Trained with a contrastive loss and an entropy regularizer (IRT_R of El-Nouby et al. 2021).",
}
TRAINED = (
    "max_iter",
    "batch_size",
    "lr",
    "weight_decay",
    "contrastive",
    "margin",
    "lambda_reg",
    "memory_ratio",
    "seed",
)


def write_card(source: Source, out: Path, folder: Path, options: ExportOptions, report: dict[str, Any]) -> None:
    """Write README.md into `folder`, which will be `out`."""
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    config, timm_check = source.config, report.get("timm")
    mean, std = normalization_constants(config, source.encoder)
    metrics = source.metrics or report.get("metrics", {})
    pooled = config.model.pooling == "cls" and source.encoder.distilled and config.model.eval_descriptor == "cls+dist"
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=source.name,
        licence=options.licence,
        version=__version__,
        config=config,
        dim=source.encoder.embed_dim,
        method=METHODS.get(config.method, ""),
        pooling="the mean of the CLS and distillation tokens" if pooled else POOLINGS[config.model.pooling],
        mean=mean,
        std=std,
        timm=timm_check,
        timm_lines=timm_check and timm_lines(source, f"hf-hub:{options.push}" if options.push else f"local-dir:{out}"),
        onnx_lines=report["files"] and onnx_lines(source, out, options.push),
        data_table=_data(source),
        recipe_table=_recipe(source),
        metrics_table=_metrics(metrics),
        metrics_note=_note(metrics, source.measured if source.metrics else ""),
        curve_table=_curve(source.log),
        trained_on=source.trained_on,
        files_table=report["files"] and files_table(report),
        latency_table=report["files"] and latency_table(report),
        batches=BATCHES,
        proof_note=report.get("note", ""),
        **{name: report.get(name) for name in ("queries", "gallery", "onnxruntime", "format", "recall", "machine")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def onnx_lines(source: Source, out: Path, push: Optional[str]) -> list[str]:
    """Python that gives `z`, the (1, D) descriptor of IMAGE, in onnxruntime."""
    config = source.config
    modules = "PIL.Image, PIL.ImageOps" if config.input.orientation == "exif" else "PIL.Image"
    file = json.dumps(f"{out}/model.onnx")
    lines = [f"import numpy, onnxruntime, {modules}"]
    if push:
        lines[0] = f"import huggingface_hub, numpy, onnxruntime, {modules}"
        file = f'huggingface_hub.hf_hub_download("{push}", "model.onnx")'
    return [
        *lines,
        f"session = onnxruntime.InferenceSession({file})",
        f"image = numpy.asarray({opened_image(source, IMAGE)})",
        'z = session.run(None, {"images": image[None]})[0]',
    ]


def files_table(report: dict[str, Any]) -> str:
    """A row per file: size, cosines and Recall@1."""
    rows = []
    for name, file in report["files"].items():
        measured = "recall" in file
        rows.append(
            [
                name,
                f"{file['bytes'] / 1e6:.1f}",
                f"{file['worst_cosine']:.7f}",
                f"{file['mean_cosine']:.7f}" if measured else "",
                f"{file['recall']:.2f}" if measured else "",
                f"{file['difference']:+.2f}" if measured else "",
            ]
        )
    return markdown(["file", "MB", "worst cosine", "mean cosine", "Recall@1 %", "difference, points"], rows)


def latency_table(report: dict[str, Any]) -> str:
    """A row per way: torch and each encoder's file."""
    rows = [[name, *(f"{ms:.2f}" for ms in values.values())] for name, values in report["latency"].items()]
    return markdown(["", *(f"batch {batch}" for batch in BATCHES)], rows)


def _data(source: Source) -> str:
    rows = [[s.name, f"{len(s):,}", f"{len(np.unique(s.labels)):,}"] for s in source.catalog.splits()]
    return markdown([source.catalog.dataset, "images", "classes"], rows)


def _recipe(source: Source) -> str:
    config = source.config
    values: dict[str, Any] = {"method": config.method, "recipe": config.recipe, "model": config.model.model}
    if config.model.model_kwargs:
        values["model_kwargs"] = " ".join(config.model.model_kwargs)
    # the name alone: where the file lies is nobody's business
    values["weights"] = os.path.basename(source.weights) if source.weights else "timm's pretrained"
    values["input"] = config.describe_input()
    flat = {name: value for part in config.to_dict().values() if isinstance(part, dict) for name, value in part.items()}
    if source.log or config.method != "irt-o":
        values |= {name: flat[name] for name in TRAINED}
    return markdown(["option", "value"], [[name, str(value).replace("|", "\\|")] for name, value in values.items()])


def _metrics(metrics: dict[str, Any]) -> str:
    names = [name for name in metrics if name.startswith("recall@")]
    names += [name for name in ("map@r", "r_precision", "map", "mrr") if name in metrics]
    rows = [[name, f"{100 * metrics[name]:.2f}", interval(metrics, name)] for name in names]
    return markdown(["metric", "%", "95 % interval"], rows) if rows else ""


def _note(metrics: dict[str, Any], measured: str) -> str:
    if not metrics:
        return ""
    counts = f"{metrics['queries']:,} queries, {metrics['gallery']:,} gallery images; intervals by bootstrap."
    return counts + (f" Measured by the run itself: {measured}." if measured else "")


def _curve(log: Sequence[dict[str, Any]]) -> str:
    """Loss and Recall@1 by step, at most CURVE_ROWS of each; empty without training."""
    losses = _spread([row for row in log if "loss" in row])
    if not losses:
        return ""
    by_step: dict[int, dict[str, Any]] = {}
    for row in [*losses, *_spread([row for row in log if "recall@1" in row])]:
        by_step.setdefault(row["step"], {}).update(row)
    rows = [
        [
            str(step),
            f"{row['loss']:.4f}" if isinstance(row.get("loss"), float) else "",
            f"{100 * row['recall@1']:.2f}" if "recall@1" in row else "",
        ]
        for step, row in sorted(by_step.items())
    ]
    return markdown(["step", "loss", "Recall@1 %"], rows)


def _spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_ROWS of the rows, the first and the last among them."""
    count = min(CURVE_ROWS, len(rows))
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))] if count else []


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write what the card says as JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
