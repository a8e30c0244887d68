"""What a training step should take on a GPU: lists of its kernels, and a model that prices them."""
