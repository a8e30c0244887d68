"""One training step, and the engines that run it."""
