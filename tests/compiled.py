"""Tests of the CPU's kernels, and of what only they do, are skipped where these can't be built."""

import pytest

from src.wkv import native

compiled = pytest.mark.skipif(native.missing("cpu") is not None, reason="the kernels can't be built here")
