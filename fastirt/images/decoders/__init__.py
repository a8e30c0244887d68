"""Decoders of images: DALI, torchvision and Pillow behind one interface."""
