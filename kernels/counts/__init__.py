"""Counts of similarities above and between thresholds, from which ranks follow without a sort."""
