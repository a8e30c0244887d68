"""Published data sets as archives: their facts, downloading, unpacking and checking."""
