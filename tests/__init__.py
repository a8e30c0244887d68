"""Tests of fastirt in the folders of its packages: `python -m pytest` from the root."""

import pytest

# Without this a failed `assert` in a helper shows no values.
pytest.register_assert_rewrite("tests.helpers", "tests.distributed.jobs")
