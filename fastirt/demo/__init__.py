"""Rendered products: a retrieval task that needs no download."""
