"""`fastirt sweep`: many runs over flags, measured on validation classes of the training set."""
