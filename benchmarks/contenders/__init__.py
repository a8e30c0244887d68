"""Peers that fastirt is measured against, and variants of its own model that were tried."""
