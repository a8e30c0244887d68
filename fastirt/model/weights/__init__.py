"""Weights of any origin into a timm model, and a model's weights into a file."""
