"""The nearest images of each test image of a data set in folders (`--dataset folder`).

python scripts/examples/search_a_folder.py FOLDER [RUN]

RUN: the folder of a run, whose model embeds the images; default: the defaults of `Config`, a
distilled DeiT-S that timm downloads.
"""

import sys
from pathlib import Path

import torch

from fastirt import Config, build_encoder, load_dataset, search
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import normalization_constants
from fastirt.retrieval.embed import embed
from fastirt.training.run_folder import RunFolder

if len(sys.argv) < 2:
    sys.exit("usage: python scripts/examples/search_a_folder.py FOLDER [RUN]")
folder, run = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None
config = RunFolder(run).read_config().replace(weights=str(run / "model.safetensors")) if run else Config()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
split = load_dataset("folder", folder).query
encoder = build_encoder(config.model, config.input.input_size).to(device)
mean, std = normalization_constants(config, encoder)
loader = EvalLoader(split, batch_size=64, input=config.input, device=device)
vectors = embed(
    encoder, loader, split.paths, mean=mean, std=std, device=device, dtype=torch.float32, name=folder
).vectors
for first, similarities, indices in search(vectors, vectors, 3, exclude_self=True):
    for i, (values, rows) in enumerate(zip(similarities.tolist(), indices.tolist())):
        nearest = ", ".join(f"{split.paths[row]} ({value:.2f})" for value, row in zip(values, rows))
        print(f"{split.paths[first + i]}: {nearest}")
