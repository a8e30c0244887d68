"""Measurements beside their limits: `python -m benchmarks PART`. See README.md and LOG.md here."""
