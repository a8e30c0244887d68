"""Batches of images for the step: samplers, crops, caches, loaders."""
