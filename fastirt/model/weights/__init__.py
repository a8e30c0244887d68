"""Load weights of any origin into a timm model, and write a model's weights to a file."""
