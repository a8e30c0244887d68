"""HTML pages in one file: reports of runs and results of searches."""
