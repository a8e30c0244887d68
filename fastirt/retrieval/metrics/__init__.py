"""Metrics of retrieval, all from the ranks of each query's positives."""

from fastirt.retrieval.metrics.measure import positives_by_labels, retrieval_metrics
from fastirt.retrieval.metrics.summary import AVERAGES, summarize

__all__ = ["AVERAGES", "positives_by_labels", "retrieval_metrics", "summarize"]
