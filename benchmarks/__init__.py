"""Measurements beside their limits: `python -m benchmarks PART`. Results in results/, experiments in LOG.md."""
