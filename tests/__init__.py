"""Tests of fastirt, in the folders of its packages; `python -m pytest` from the root of the repository."""
