"""Data sets whose records come from a function of the user."""
