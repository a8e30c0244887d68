"""The encoder: a timm vision transformer, its weights, momentum encoder and precision."""
