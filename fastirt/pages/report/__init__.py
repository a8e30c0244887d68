"""The page of `fastirt report --html`."""
