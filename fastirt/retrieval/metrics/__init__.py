"""Metrics of retrieval, all from the ranks of each query's positives."""

from fastirt.retrieval.metrics.measure import PositivesByLabel, retrieval_metrics
from fastirt.retrieval.metrics.summary import AVERAGES, QueryMetrics, summarize

__all__ = ["AVERAGES", "PositivesByLabel", "QueryMetrics", "retrieval_metrics", "summarize"]
