"""The growing output: wherever a write is torn off, what is whole is found again, and nothing else is touched."""

import errno
import fcntl
import json
import os
from io import BufferedReader, BytesIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from src.data.csv import HEADER, Row, format_row
from src.errors import UserError
from src.generation.output import open_output, read_progress
from tests.data.reading import read_pairs

OTHERS = {"seed": 2, "stop": [], "top_p": 0.3, "quantization": None}
SETTINGS = {"seed": 1, "stop": ["\n\n"], "top_p": 0.3, "quantization": None}
characters = st.one_of(st.sampled_from('",\n\r'), st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
text = st.text(characters, min_size=1, max_size=8)
rows_and_kept = st.lists(st.tuples(st.builds(Row, text, text, text), st.booleans()), min_size=1, max_size=4)


def written(rows) -> bytes:
    return (HEADER + "".join(map(format_row, rows))).encode()


def known(rows, kept=(False,) * 3) -> list[tuple[int, Row]]:
    """The rows, numbered, as the input has them: without a reject where it is not kept."""
    return [(number, row if keep else row._replace(reject=""))
            for number, (row, keep) in enumerate(zip(rows, kept, strict=True), start=1)]


@given(rows_and_kept, st.integers(1, 30))
@example([(Row("p", "c", 'a"\nb'), False), (Row("p", "c", '"\n"\n'), False)], 2)
def test_every_torn_end_is_found(pairs, block):
    rows, kept = zip(*pairs, strict=True)
    data = written(rows)
    ends = [len(written(rows[:n])) for n in range(len(rows) + 1)]
    for cut in range(len(data) + 1):
        done = sum(end <= cut for end in ends) - 1
        file = BufferedReader(BytesIO(data[:cut]), block)
        assert read_progress(file, known(rows, kept), "out.csv") == ((done, ends[done]) if done >= 0 else (0, 0))


def test_an_output_is_read_in_small_parts():
    class Watched(BytesIO):
        def read(self, size=-1):
            assert 0 <= size < 50
            return super().read(size)

    rows = [Row(f"p{number}", "c", "r\n" * 3) for number in range(100)]
    assert read_progress(Watched(written(rows)), known(rows, [False, True] * 50), "out.csv") == (100, len(written(rows)))


ROWS = [Row("p", "c", "r"), Row('a "quoted", text\nin two lines', "c", "r2"), Row("p3", "c3", "r3")]


@pytest.mark.parametrize(("data", "message"), [
    (b"prompt,chosen\n", "does not begin with"),
    (b"some other file", "does not begin with"),
    (written([Row("other", "c", "r")]), "its row 1 was not made from row 1"),
    (written([ROWS[0], Row(ROWS[1].prompt, "other", "r2"), ROWS[2]]), "its row 2 was not made from row 2"),
    (written([ROWS[0]._replace(reject="other")]), "its row 1 was not made from row 1"),
    (written(ROWS[:2])[:-2] + b" \n" + format_row(ROWS[2]).encode(), "its row 2 was not made"),  # edited, not torn
    (written(ROWS[:1]) + format_row(ROWS[1]).replace('"r2"', "r2").encode(), "its row 2 was not made"),
    (written([ROWS[0], ROWS[1]._replace(reject="")]), "its row 2 was not made"),
    (written([*ROWS, ROWS[0]]), "more rows than the 3"),
    (written(ROWS) + b"x", "more rows than the 3"),
])
def test_what_is_no_beginning_of_this_output_is_refused_and_stays(data, message, tmp_path):
    path = tmp_path / "out.csv"
    with open_output(path, SETTINGS, known(ROWS, [True, False, False])):
        pass
    path.write_bytes(data)
    with pytest.raises(UserError, match=message), open_output(path, SETTINGS, known(ROWS, [True, False, False])):
        pass
    assert path.read_bytes() == data


def test_the_file_is_whole_after_every_append(tmp_path):
    path = tmp_path / "new folder" / "out.csv"
    with open_output(path, SETTINGS, known(ROWS)) as output:
        assert path.read_bytes() == HEADER.encode()
        output.append(ROWS[:1])
        assert read_pairs(path, require_reject=True) == ROWS[:1]
        output.append(ROWS[1:])
        assert read_pairs(path, require_reject=True) == ROWS
    with open_output(path, SETTINGS, known(ROWS)) as output:
        assert output.done == 3


def test_a_full_disk_leaves_the_finished_rows(tmp_path, monkeypatch):
    path, real_write = tmp_path / "out.csv", os.write
    with open_output(path, SETTINGS, known(ROWS)) as output:
        output.append(ROWS[:1])

        def write(descriptor, data):
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real_write(descriptor, data[:10])

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(UserError, match=r"out\.csv: cannot be written \(No space left on device\)"):
            output.append(ROWS[1:])
        assert path.read_bytes() == written(ROWS[:1])
        monkeypatch.undo()
        output.append(ROWS[1:])
    assert path.read_bytes() == written(ROWS)


@pytest.mark.parametrize(("sidecar", "message"), [
    (None, "exists without the out.csv.json"), ("{", "is damaged"), ("[]", "is damaged"),
    (json.dumps(SETTINGS | {"seed": 2, "top_p": 0.5}), r"started with seed 2 \(now 1\), top_p 0.5 \(now 0.3\); give the same"),
    (json.dumps({"seed": 1, "stop": ["\n\n"], "top_p": 0.3}), r"quantization None \(now None\)"),
])
def test_another_runs_settings_are_refused(sidecar, message, tmp_path):
    path = tmp_path / "out.csv"
    path.write_bytes(written(ROWS[:1]))
    if sidecar is not None:
        (tmp_path / "out.csv.json").write_text(sidecar)
    with pytest.raises(UserError, match=message), open_output(path, SETTINGS, known(ROWS)):
        pass
    assert path.read_bytes() == written(ROWS[:1])


@pytest.mark.parametrize(("before", "now"), [("\n\n", ["\n\n"]), ("", [])])
def test_a_file_from_before_there_could_be_several_stops_is_continued(tmp_path, before, now):
    path = tmp_path / "out.csv"
    path.write_bytes(written(ROWS[:1]))
    (tmp_path / "out.csv.json").write_text(json.dumps(SETTINGS | {"stop": before}))
    with open_output(path, SETTINGS | {"stop": now}, known(ROWS)) as output:
        assert output.done == 1


def test_two_runs_at_once_are_refused(tmp_path):
    path = tmp_path / "out.csv"
    with path.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing it"), open_output(path, SETTINGS, known(ROWS)):
            pass
    with open_output(path, SETTINGS, known(ROWS)) as output:
        assert output.done == 0


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_of_somebody_that_has_the_sidecar_s_name_is_refused_and_stays(tmp_path, exists):
    path, theirs = tmp_path / "out.csv", tmp_path / "out.csv.json"
    theirs.write_text('{"my": "dataset"}')
    if exists:
        path.write_text(HEADER)
    with pytest.raises(UserError, match=r"out.csv.json: .* not of out.csv"), open_output(path, SETTINGS, known(ROWS)):
        pass
    assert path.exists() == exists and theirs.read_text() == '{"my": "dataset"}'


def test_a_link_stays_one_where_nothing_was_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out.csv"
    link.symlink_to(tmp_path / "elsewhere" / "real.csv")
    with pytest.raises(UserError), open_output(link, SETTINGS, known(ROWS)):
        raise UserError("the logits are not finite")
    assert link.is_symlink() and [path.name for path in tmp_path.rglob("*.*")] == ["out.csv"]
    with open_output(link, SETTINGS, known(ROWS)) as output:
        output.append(ROWS)
    assert (tmp_path / "elsewhere" / "real.csv").read_bytes() == written(ROWS)


@pytest.mark.parametrize("failed_in", ["this process", "a killed one"])
def test_an_output_without_a_row_blocks_no_other_settings(tmp_path, failed_in):
    path = tmp_path / "out.csv"
    if failed_in == "this process":
        with pytest.raises(UserError), open_output(path, OTHERS, known(ROWS)):
            raise UserError("the logits are not finite")
        assert not list(tmp_path.iterdir())
    else:
        path.write_text("prompt,chosen,reject\n")
        (tmp_path / "out.csv.json").write_text(json.dumps(OTHERS))
    with open_output(path, SETTINGS, known(ROWS)) as output:
        output.append([ROWS[0]._replace(reject="no")])
    assert json.loads((tmp_path / "out.csv.json").read_text()) == SETTINGS
    with pytest.raises(UserError, match="was started with seed 1"), \
            open_output(path, OTHERS, known(ROWS)):
        pass
    assert path.read_text().count("\n") == 2
