"""Tests of the CPU's kernels, and of what only they do, are skipped where these can't be built."""

import pytest

from src import kernels

compiled = pytest.mark.skipif(kernels.missing("cpu") is not None, reason="the kernels can't be built here")
