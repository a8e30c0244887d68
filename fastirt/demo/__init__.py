"""The demo set: rendered products, a retrieval task without a download."""
