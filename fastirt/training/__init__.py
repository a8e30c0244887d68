"""The training loop, its checkpoints and what a run writes."""
