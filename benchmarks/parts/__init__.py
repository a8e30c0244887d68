"""The parts of the benchmark: `python -m benchmarks PART` runs one of them."""
