"""What fastirt is measured against, and what it was tried against."""
