"""RetrievalLoss in your own training loop, with a small memory.

python scripts/examples/own_training_loop.py
"""

import torch
from torch import nn

from fastirt import RetrievalLoss, retrieval_metrics

torch.manual_seed(0)
CLASSES, DIM, BATCH, SLOTS = 32, 16, 64, 512
centers = torch.randn(2 * CLASSES, 64)  # training uses the first half
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, DIM))
loss = RetrievalLoss(margin=0.5, lambda_reg=0.3, contrastive="nonzero_mean")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
memory, memory_labels = torch.zeros(SLOTS, DIM), torch.full((SLOTS,), -1)  # -1: an empty slot


def images(labels):
    return centers[labels] + torch.randn(len(labels), 64)


for step in range(200):
    labels = torch.randint(CLASSES, (BATCH,))
    embeddings = model(images(labels))
    losses = loss(embeddings, labels, memory, memory_labels)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    slots = torch.arange(step * BATCH, (step + 1) * BATCH) % SLOTS
    memory[slots], memory_labels[slots] = nn.functional.normalize(embeddings.detach(), dim=1), labels

labels = torch.arange(CLASSES, 2 * CLASSES).repeat(8)
with torch.no_grad():
    vectors = nn.functional.normalize(model(images(labels)), dim=1)
print(retrieval_metrics(vectors, labels, vectors, labels, (1, 2, 4), exclude_self=True))
