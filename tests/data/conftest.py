"""Where rows and tokens are kept: in memory, as those of small files are, or in files, as those of large ones."""

import json
from collections.abc import Callable, Iterator

import pytest

from src.data import examples, json_window, source, spill
from src.data.faults import Reading
from src.data.read import read_pairs


@pytest.fixture(scope="module", params=["in memory", "in files"])
def storage(request) -> Iterator[None]:
    """Tests that use this run twice, the second time with everything in files and read in the smallest pieces."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in files":
            for place, name, size in ((spill, "IN_MEMORY", 0), (spill, "BLOCK", 100), (source, "_PIECE", 3),
                                      (json_window, "_PIECE", 3), (examples, "_PIECE", 3)):
                patch.setattr(place, name, size)
        yield


@pytest.fixture
def read(tmp_path) -> Callable[..., Reading]:
    """`read(record, ...)` -> the reading of a JSONL of these records as pairs or thumbs."""

    def make(*records: dict, require_reject: bool = True) -> Reading:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return read_pairs(path, require_reject)

    return make
