"""Where rows and tokens are kept: in memory, as those of small files are, or in files, as those of large ones."""

from collections.abc import Iterator

import pytest

from src.data import examples, json_values, source, spill


@pytest.fixture(scope="module", params=["in memory", "in files"])
def storage(request) -> Iterator[None]:
    """Tests that use this run twice, the second time with everything in files and read in the smallest pieces."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in files":
            for place, name, size in ((spill, "IN_MEMORY", 0), (spill, "BLOCK", 100), (source, "_PIECE", 3),
                                      (json_values, "_PIECE", 3), (examples, "_PIECE", 3)):
                patch.setattr(place, name, size)
        yield
