"""Batches of images in the background: samplers, crops, caches, loaders."""
