"""The nearest images of each image in a folder of class folders: python scripts/examples/search_a_folder.py FOLDER [RUN]

RUN: the run whose model embeds them; without one DeiT-S from timm does, which needs a network.
"""

import sys
from pathlib import Path

import torch

from fastirt import Config, build_encoder, load_dataset, search
from fastirt.loading.eval_loader import EvalLoader
from fastirt.model.encoder import normalization_constants
from fastirt.retrieval.embed import embed
from fastirt.training.run_folder import RunFolder

folder, run = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None
config = RunFolder(run).read_config().replace(weights=str(run / "model.safetensors")) if run else Config()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
split = load_dataset("folder", folder).query
encoder = build_encoder(config.model, config.input.input_size).to(device)
mean, std = normalization_constants(config, encoder)
loader = EvalLoader(split, batch_size=64, input=config.input, device=device)
how = dict(mean=mean, std=std, device=device, dtype=torch.float32, name=folder)
vectors = embed(encoder, loader, split.paths, **how).vectors
for first, similarities, rows in search(vectors, vectors, 3, exclude=torch.arange(len(vectors))):
    for i, (values, found) in enumerate(zip(similarities.tolist(), rows.tolist())):
        near = ", ".join(f"{split.paths[row]} ({value:.2f})" for value, row in zip(values, found))
        print(f"{split.paths[first + i]}: {near}")
