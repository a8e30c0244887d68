"""Exported files beside the run's own encoder: cosines of real images, and Recall@1 of the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastirt.datasets import Split
from fastirt.export.options import IMAGES, PIXELS
from fastirt.export.source import Source
from fastirt.images.decoders.pil import decode
from fastirt.images.normalize import normalize
from fastirt.images.prepare import prepare
from fastirt.model.encoder import normalization_constants
from fastirt.retrieval.embed import Embeddings
from fastirt.retrieval.evaluate import embed_splits, excluded_rows, labels_of
from fastirt.retrieval.metrics import retrieval_metrics

if TYPE_CHECKING:
    import onnx  # of the extra, which --timm does without

MIN_COSINE = 0.99999  # of each image in fp32
MIN_PILLOW_COSINE = 0.999  # of images that the run's reader resizes by Pillow, whose levels differ by 0.2
SAMPLE = 128  # images that check a file whose input is the encoder's
BATCH = 16  # images of one size that a file gets at once
WAITING_BYTES = 256 * 2**20  # of images that wait for others of their size
LARGE_BYTES = 16 * 2**20  # of a batch, after which a session gives its memory back

Vectors = dict[str, Embeddings]  # by split


class Agreement(NamedTuple):
    """Of N exported vectors with the encoder's.

    Attributes:
        worst: smallest cosine.
        mean: mean cosine.
        worst_image: file of the smallest cosine.
        worst_pillow: smallest cosine of the images that the run's reader resizes by Pillow, which
            `worst` leaves out; 1 without any.
        pillow: their number.
    """

    worst: float
    mean: float
    worst_image: str
    worst_pillow: float
    pillow: int


def encoder_vectors(source: Source, progress: bool) -> Vectors:
    """By the run's own evaluation, in fp32."""
    read = embed_splits(
        source.encoder, source.catalog, source.config, source.device, stores=source.packed, progress=progress
    )
    return {split.name: vectors for split, vectors in zip(source.evaluated(), read)}


def session(model: onnx.ModelProto | str) -> Any:
    """An onnxruntime session of a graph, or of a file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # So that latencies compare: waiting threads of one session would slow the next one down.
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    data = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def file_vectors(
    sessions: dict[str, Any], source: Source, known: Vectors, progress: bool
) -> tuple[dict[str, Vectors], dict[str, Tensor]]:
    """The vectors of each session, whose input are images, for the images of `known`.

    Returns also, by split, (N,) bool: images that the run's reader resizes by Pillow.
    """
    found: dict[str, Vectors] = {name: {} for name in sessions}
    by_pillow = {}
    for split in source.evaluated():
        rows = known[split.name].rows
        out = {name: torch.zeros(len(rows), source.encoder.embed_dim) for name in sessions}
        by_pillow[split.name] = torch.zeros(len(rows), dtype=torch.bool)
        name = f"{split.name}, onnxruntime"
        with tqdm(total=len(rows), desc=name, unit="img", disable=None if progress else True, leave=False) as bar:
            for positions, images in _batches(source, split, rows, by_pillow[split.name]):
                for name, running in sessions.items():
                    out[name][positions] = _finite(running.run(None, {IMAGES: images}, _run_options(images))[0])
                bar.update(len(positions))
        for name in sessions:
            found[name][split.name] = Embeddings(out[name], rows)
    return found, by_pillow


def _run_options(images: np.ndarray) -> Any:
    """A session keeps the memory of its largest batch: with four of them and photographs of 12
    megapixels many GB. None for small images, which giving it back would slow down.
    """
    if images.nbytes < LARGE_BYTES:
        return None
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def sample_pixels(source: Source, split: Split, count: int = SAMPLE) -> tuple[np.ndarray, np.ndarray]:
    """((N, 3, S, S) float32 as the encoder takes them, (N,) rows) of images all over a split."""
    mean, std = normalization_constants(source.config, source.encoder)
    chosen = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(np.int64))
    pixels, rows = [], []
    for batch in source.loader(split, chosen):
        pixels.append(normalize(batch.images, mean, std)[: batch.valid].cpu().numpy())
        rows.append(chosen[np.asarray(batch.indices[: batch.valid])])
    return np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(rows)


def pixel_agreement(running: Any, sample: tuple[np.ndarray, np.ndarray], source: Source, known: Vectors) -> float:
    """The smallest cosine of a session whose input are normalized pixels.

    sample: of queries, as `sample_pixels` gives it.
    """
    split, (pixels, rows) = source.evaluated()[0], sample
    expected = known[split.name].vectors[torch.isin(known[split.name].rows, torch.from_numpy(rows))]
    out = [running.run(None, {PIXELS: pixels[i : i + BATCH]})[0] for i in range(0, len(pixels), BATCH)]
    return float((_finite(np.concatenate(out)) * expected).sum(1).min())


def agreement(found: Vectors, known: Vectors, by_pillow: dict[str, Tensor], source: Source) -> Agreement:
    """How far the vectors of a file are from the encoder's."""
    splits = source.evaluated()
    cosines = torch.cat([(found[s.name].vectors * known[s.name].vectors).sum(1) for s in splits])
    pillow = torch.cat([by_pillow[s.name] for s in splits])
    paths = [s.paths[row] for s in splits for row in known[s.name].rows.tolist()]
    own = torch.where(pillow, 2.0, cosines)
    worst = int(own.argmin())
    return Agreement(
        min(1.0, float(own[worst])),
        float(cosines.mean()),
        paths[worst],
        float(cosines[pillow].min()) if pillow.any() else 1.0,
        int(pillow.sum()),
    )


def metrics(vectors: Vectors, source: Source, ks: Sequence[int] = ()) -> dict[str, Any]:
    """Of the data set's own test, as `retrieval_metrics`; ks: of Recall@K, default the run's."""
    splits = source.evaluated()
    query, gallery = vectors[splits[0].name], vectors[splits[-1].name]
    labels = [labels_of(split, vectors[split.name]) for split in splits]
    excluded = excluded_rows(query, gallery, source.catalog)
    most = len(gallery.rows) - bool((excluded >= 0).any())
    return retrieval_metrics(
        query.vectors,
        labels[0],
        gallery.vectors,
        labels[-1],
        ks or [k for k in source.config.eval.rank if k <= most],
        exclude=excluded,
        average=source.config.eval.average,
    )


def recall_at_1(vectors: Vectors, source: Source) -> float:
    """In percent."""
    return 100 * metrics(vectors, source, [1])["recall@1"]


def _batches(source: Source, split: Split, rows: Tensor, by_pillow: Tensor) -> Iterator[tuple[list[int], np.ndarray]]:
    """(positions in `rows`, (N, H, W, 3) uint8): images as they are decoded, together with those of
    their size.
    """
    images, waiting = source.images(split), {}
    held = 0
    for position, row in enumerate(rows.tolist()):
        data = images.read(row)
        if source.packed is None:
            prepared = prepare(data, images.path(row), source.config.input)[0]
            by_pillow[position] = prepared is not data and prepared[:2].tobytes() != b"\xff\xd8"
        image = np.asarray(decode(data, source.config.input.orientation))
        waiting.setdefault(image.shape, []).append((position, image))
        held += image.nbytes
        if len(waiting[image.shape]) == BATCH:
            ready = waiting.pop(image.shape)
            held -= BATCH * image.nbytes
            yield _stacked(ready)
        elif held > WAITING_BYTES:
            yield from map(_stacked, waiting.values())
            waiting, held = {}, 0
    yield from map(_stacked, waiting.values())


def _stacked(images: list[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
    return [position for position, _ in images], np.stack([image for _, image in images])


def _finite(vectors: np.ndarray) -> Tensor:
    """Vectors that overflowed in fp16 become zeros, which find nothing."""
    return torch.from_numpy(np.nan_to_num(vectors, nan=0.0, posinf=0.0, neginf=0.0))
