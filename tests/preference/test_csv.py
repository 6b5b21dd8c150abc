"""The pairs CSV: whatever the csv module and pandas write is read back, and every fault names its row."""

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UserError
from src.preference.csv import HEADER, Row, format_row, write_pairs_csv
from src.preference.read import read_pairs

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

# Any text of Unicode but NUL; the structural characters come often, and some words that parsers take for "missing".
any_text = st.one_of(
    st.text(st.one_of(st.sampled_from('",;\r\n\'\t \\'), st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
            max_size=20),
    st.sampled_from(["NA", "null", "nan", "None", "", "1e5", "0012", "\ufeffx", '"', "\r", "\n"]),
)
some_text = any_text.filter(str.strip)
row_lists = st.lists(st.builds(Row, some_text, some_text, any_text), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


def put(folder, content: bytes | str) -> Path:
    path = folder / "pairs.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(folder, content: bytes | str, require_reject=False) -> str:
    path = put(folder, content)
    with pytest.raises(UserError) as caught:
        read_pairs(path, require_reject)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "\r" not in message
    return message.removeprefix(f"{path}: ")


@given(rows=row_lists, bom=st.booleans(), dialect=st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL),
                                                                 ("\r\n", csv.QUOTE_MINIMAL), ("\r", csv.QUOTE_ALL)]),
       order=st.permutations(["prompt", "chosen", "reject", "source"]), blank_lines=st.booleans(), last_newline=st.booleans())
def test_reads_what_the_csv_module_writes(folder, rows, bom, dialect, order, blank_lines, last_newline):
    newline, quoting = dialect
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, order, lineterminator=newline, quoting=quoting)
    writer.writeheader()
    for row in rows:
        if blank_lines:
            buffer.write(newline)
        writer.writerow(row._asdict() | {"source": "x, y"})
    text = buffer.getvalue()
    if not last_newline:
        text = text.removesuffix(newline)
    assert read_pairs(put(folder, ("\ufeff" if bom else "") + text), require_reject=False) == rows


@given(rows=row_lists)
def test_round_trip_and_growth_by_appending(folder, rows):
    path = folder / "written.csv"
    write_pairs_csv(path, rows)
    assert read_pairs(path, require_reject=False) == rows
    assert path.read_bytes().decode() == HEADER + "".join(map(format_row, rows))


def test_pandas_reads_what_we_write_and_the_reverse(folder):
    rows = [Row("a,b", 'say "hi"', "two\nlines"), Row("NA", "null", ""), Row(" é😀 ", "x\r\ny", "\\n")]
    write_pairs_csv(folder / "ours.csv", rows)
    frame = pd.read_csv(folder / "ours.csv", dtype=str, keep_default_na=False)
    assert [tuple(values) for values in frame.values] == rows
    pd.DataFrame(rows).to_csv(folder / "theirs.csv", index=False)
    assert read_pairs(folder / "theirs.csv", require_reject=False) == rows


def test_nul_from_a_model_does_not_break_our_own_file(folder):
    write_pairs_csv(folder / "nul.csv", [Row("p", "c", "r\0r")])
    assert read_pairs(folder / "nul.csv", require_reject=True) == [Row("p", "c", "r\ufffdr")]


def test_reject_column_may_be_absent_before_generation(folder):
    assert read_pairs(put(folder, "chosen,prompt\nc,p\n"), require_reject=False) == [Row("p", "c", "")]
    message = refusal(folder, "chosen,prompt\nc,p\n", require_reject=True)
    assert "no reject column" in message and "rlhf_generate_reject_csv.py" in message


def test_fields_beyond_the_csv_modules_limit_are_read_and_the_limit_is_left_alone(folder):
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    assert read_pairs(put(folder, f"{HEADER}p,c,{long}\n"), require_reject=True) == [Row("p", "c", long)]
    refusal(folder, f'{HEADER}p,c,"{long}')
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("content, beginning, hint", [
    ("", "the file is empty", "header"),
    ("\ufeff\r\n \n", "the header lacks prompt and chosen", "prompt,chosen,reject"),
    (HEADER, "there is no data row", ""),
    (HEADER + "\n\r\n", "there is no data row", ""),
    ("prompt,answer\na,b\n", "the header lacks chosen (found: prompt, answer)", "prompt,chosen,reject"),
    ("prompt;chosen;reject\na;b;c\n", "the header lacks prompt and chosen (found: prompt;chosen;reject)", ""),
    ("prompt,chosen,prompt\na,b,c\n", "the header has the column prompt more than once", ""),
    (HEADER + 'p,c,r\n\n"a\nb",c,r\np, \t,r\n', "row 3 has an empty chosen", ""),
    (HEADER + "p,c,r\n,c,r\n", "row 2 has an empty prompt", ""),
    (HEADER + "p,c,r\np,c\n", "row 2 has 2 fields where the header has 3", "double quotes"),
    (HEADER + "p,c,r\np,c,r,s\n", "row 2 has 4 fields where the header has 3", "double quotes"),
    (HEADER + 'p,c,r\np,"c,r\np,c,r\n', "row 2: a quoted field is not closed", "twice"),
    (HEADER + 'p,c,r\np,"c,r\np,"c",r\n', "row 2: a quoted field is not closed", "twice"),
    ('prompt,"chosen,reject\np,c,r\n', "the header: a quoted field is not closed", "twice"),
    (HEADER + 'p,"c\nc",r\np,"a\0b",r\n', "row 2: holds a NUL character", "UTF-8"),
    (HEADER.encode() + 'p,"c\n\né",r\n'.encode() + b"p,\xe9,r\n", "row 2: byte 0xe9 at offset 35 is not UTF-8",
     "save the file as UTF-8"),
    (HEADER.encode() + b'p,"c\n\xff', "row 1: byte 0xff at offset 26 is not UTF-8", ""),
    (HEADER.encode() + b"p,c,r\n\xffp,c,r", "row 2: byte 0xff at offset 27 is not UTF-8", ""),
    (b"\xef\xbb\xbf" + HEADER.encode() + b"p,c\xff,r\n", "row 1: byte 0xff at offset 27 is not UTF-8", ""),
    (HEADER.encode("utf-16"), "the header: byte 0xff at offset 0 is not UTF-8", ""),
    (HEADER.encode("utf-16-le"), "the header: holds a NUL character", ""),
])
def test_faults_name_the_row(folder, content, beginning, hint):
    message = refusal(folder, content)
    assert message.startswith(beginning) and hint in message


def test_an_empty_reject_names_its_row_and_the_remedy(folder):
    content = HEADER + "p,c,r\np,c, \n"
    assert read_pairs(put(folder, content), require_reject=False)[1].reject == " "
    message = refusal(folder, content, require_reject=True)
    assert message.startswith("row 2 has no reject") and "rlhf_generate_reject_csv.py" in message


def test_a_missing_file_and_a_folder_are_named(folder):
    for path in (folder / "nowhere.csv", folder):
        with pytest.raises(UserError, match=str(path)):
            read_pairs(path, require_reject=False)


@given(data=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda tail: HEADER.encode() + tail)))
def test_any_bytes_are_read_or_refused_in_one_line(folder, data):
    path = put(folder, data)
    try:
        rows = read_pairs(path, require_reject=True)
        assert rows and all(text.strip() for row in rows for text in row)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.skipif(not SHARED.exists(), reason="shared data is not here")
def test_real_pairs():
    rows = read_pairs(SHARED / "hh_harmless_pairs.csv", require_reject=True)
    frame = pd.read_csv(SHARED / "hh_harmless_pairs.csv", dtype=str, keep_default_na=False)
    assert len(rows) == 1500
    assert rows == [Row(*values) for values in frame[["prompt", "chosen", "reject"]].values]
    path = SHARED / "self_instruct_prompts.csv"
    assert read_pairs(path, require_reject=False)
    with pytest.raises(UserError, match="row 1 has no reject"):
        read_pairs(path, require_reject=True)
