"""Draw the README's four figures to .github/figures, from the runs of the quickstart and results.

bash scripts/quickstart.sh && python scripts/readme_figures.py
"""

import io
import json
import shutil
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw

from fastirt.config import Config
from fastirt.datasets import Catalog, load_dataset
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.build import build_encoder
from fastirt.model.encoder import normalization_constants
from fastirt.retrieval.embed import embed
from fastirt.retrieval.search import search
from fastirt.training.run_folder import RunFolder

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

RUNS, FIGURES = Path("outputs/quickstart"), Path(".github/figures")
SIDE, GAP, FRAME, NEIGHBORS, QUERIES = 64, 6, 3, 5, 5
HIT, MISS, INK = "#2a9d4a", "#c8413a", "#30343b"
CPU = torch.device("cpu")


def neighbors(run: Path, catalog: Catalog) -> torch.Tensor:
    """(Q, NEIGHBORS) nearest rows of the test split for each of its images, by the final model."""
    config: Config = RunFolder(run).read_config().replace(weights=str(run / "model.safetensors"))
    encoder = build_encoder(config.model, config.input.input_size)
    mean, std = normalization_constants(config, encoder)
    loader = EvalLoader(catalog.query, batch_size=128, input=config.input, device=CPU)
    paths = catalog.query.paths
    vectors = embed(encoder, loader, paths, mean=mean, std=std, device=CPU, dtype=torch.float32, progress=False).vectors
    return torch.cat([indices for *_, indices in search(vectors, vectors, NEIGHBORS, exclude_self=True)])


def retrieval_grid(catalog: Catalog) -> Image.Image:
    """One query per row: its neighbors before and after training, correct ones framed green."""
    before, after = (neighbors(RUNS / name, catalog) for name in ("irt-o", "irt-r"))
    labels = torch.from_numpy(catalog.query.labels)
    gained = (labels[after] == labels[:, None]).sum(1) - (labels[before] == labels[:, None]).sum(1)
    order = gained.argsort(descending=True, stable=True)
    # From the largest to the smallest gain.
    queries = order[:: max(1, len(order) // QUERIES)][:QUERIES].tolist()
    cell, head = SIDE + 2 * FRAME + GAP, 22
    columns = [0, *(1.4 + i for i in range(NEIGHBORS)), *(1.8 + NEIGHBORS + i for i in range(NEIGHBORS))]
    sheet = Image.new("RGB", (int(cell * (columns[-1] + 1)), head + cell * len(queries)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in ((0, "query"), (1, "IRT_O: off the shelf"), (1 + NEIGHBORS, "IRT_R: trained")):
        pen.text((cell * columns[column], 4), title, fill=INK, font_size=13)
    for row, query in enumerate(queries):
        rows = [query, *before[query].tolist(), *after[query].tolist()]
        for column, image in zip(columns, rows):
            at = int(cell * column), head + row * cell
            color = INK if column == 0 else (HIT if labels[image] == labels[query] else MISS)
            pen.rectangle((at[0], at[1], at[0] + SIDE + 2 * FRAME - 1, at[1] + SIDE + 2 * FRAME - 1), fill=color)
            thumbnail = Image.open(catalog.query.paths[image]).convert("RGB").resize((SIDE, SIDE))
            sheet.paste(thumbnail, (at[0] + FRAME, at[1] + FRAME))
    return sheet


def best_result(path: Path) -> None:
    """Recall@1 on grocery81, beside the public re-implementation on the same images."""
    results = json.loads(Path("benchmarks/results/2026-11-23-grocery81.json").read_text())
    fastirt = [100 * run["metrics"]["recall@1"] for run in results["runs"]]
    public = [values[0] for name, values in results["reference"].items() if name != "what"]
    figure, axes = plt.subplots(figsize=(6, 2.6))
    names = ["IRT_O\nno training", "IRT_L\n200 steps", "IRT_R\n200 steps"]
    for i, values in enumerate(zip(fastirt, public)):
        for offset, value, color in zip((-0.19, 0.19), values, (HIT, "#9aa0a8")):
            axes.bar(i + offset, value, 0.36, color=color)
            axes.text(i + offset, value + 1, f"{value:.1f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="Recall@1 in %", ylim=(0, 108), title="grocery81, DeiT-tiny on two CPU cores")
    axes.legend(["fastirt", "public code"], loc="upper left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for handle, color in zip(axes.get_legend().legend_handles, (HIT, "#9aa0a8")):
        handle.set_color(color)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def data_flow(path: Path) -> None:
    """The way of an image through the packages to the loss and to the metrics."""
    boxes = ("datasets\npath, label, split", "images\ncheck, decode, resize", "loading\ncrop, cache, batch")
    boxes += ("model\ntimm ViT", "objective\ncontrastive + λ KoLeo", "step\none update")
    figure, axes = plt.subplots(figsize=(13, 2.2))
    for i, text in enumerate(boxes):
        axes.text(
            i, 1, text, ha="center", va="center", fontsize=8, bbox=dict(boxstyle="round,pad=0.5", fc="#eef3f0", ec=HIT)
        )
        if i:
            axes.annotate("", (i - 0.33, 1), (i - 0.67, 1), arrowprops=dict(arrowstyle="->", color=INK))
    for i, text in ((3, "momentum\nencoder"), (4, "cross-batch\nmemory"), (5, "retrieval\nRecall@K, MAP@R")):
        axes.text(
            i, 0, text, ha="center", va="center", fontsize=8, bbox=dict(boxstyle="round,pad=0.4", fc="white", ec=INK)
        )
        axes.annotate("", (i, 0.33), (i, 0.67), arrowprops=dict(arrowstyle="<->" if i == 4 else "->", color=INK))
    axes.set(xlim=(-0.6, 5.9), ylim=(-0.5, 1.5))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def report_page(page: Path) -> Image.Image:
    """The quickstart's page on a desk in light mode, and its failures on a phone in dark mode."""
    from playwright.sync_api import sync_playwright

    height = 1600
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shots = []
        for width, scheme, start in ((1240, "light", "header"), (390, "dark", "#failures")):
            context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            opened = context.new_page()
            opened.goto(page.resolve().as_uri())
            opened.locator(start).evaluate("element => element.scrollIntoView()")
            shots.append(Image.open(io.BytesIO(opened.screenshot())))
        chromium.close()
    sheet = Image.new("RGB", (sum(shot.width for shot in shots) + 20, height), "white")
    sheet.paste(shots[0], (0, 0))
    sheet.paste(shots[1], (shots[0].width + 20, 0))
    sheet.thumbnail((1300, height))
    return sheet


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "fastirt"  # equal runs give equal files
    FIGURES.mkdir(parents=True, exist_ok=True)
    retrieval_grid(load_dataset("demo", "data/demo")).save(FIGURES / "retrieval.jpg", quality=88)
    report_page(RUNS / "report.html").save(FIGURES / "report.jpg", quality=80, optimize=True)
    best_result(FIGURES / "grocery81.svg")
    data_flow(FIGURES / "data_flow.svg")
