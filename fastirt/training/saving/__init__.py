"""Checkpoints that do not stop the loop: copies of the state, and the thread that writes them."""
