"""Retrieval: embeddings, search, metrics and tables."""
