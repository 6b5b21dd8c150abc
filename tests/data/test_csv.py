"""The pairs CSV: whatever the csv module and pandas write is read back, and every fault names its row."""

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.csv import HEADER, Row, format_row
from src.errors import UserError
from tests.data.reading import read_pairs
from tests.pairs_csv import write_pairs_csv

pytestmark = pytest.mark.usefixtures("storage")

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

# Any text of Unicode but NUL; the structural characters come often, and some words that parsers take for "missing".
any_text = st.one_of(
    st.text(st.one_of(st.sampled_from('",;\r\n\'\t \\'), st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
            max_size=20),
    st.sampled_from(["NA", "null", "nan", "None", "", "1e5", "0012", "\ufeffx", '"', "\r", "\n"]),
)
some_text = any_text.filter(str.strip)
SEPARATORS = [",", "\t", ";", "|"]
row_lists = st.lists(st.builds(Row, some_text, some_text, any_text), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


def put(folder, content: bytes | str, name: str = "pairs.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(folder, content: bytes | str, require_reject=False, name: str = "pairs.csv") -> str:
    path = put(folder, content, name)
    with pytest.raises(UserError) as caught:
        read_pairs(path, require_reject)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "\r" not in message
    return message.removeprefix(f"{path}: ")


@given(rows=row_lists, bom=st.booleans(), dialect=st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL),
                                                                 ("\r\n", csv.QUOTE_MINIMAL), ("\r", csv.QUOTE_ALL)]),
       order=st.permutations(["prompt", "chosen", "reject", "source"]), blank_lines=st.booleans(), last_newline=st.booleans(),
       separator=st.sampled_from(SEPARATORS), name=st.sampled_from(["pairs.csv", "pairs.tsv", "pairs.TAB", "pairs"]))
def test_reads_what_the_csv_module_writes(folder, rows, bom, dialect, order, blank_lines, last_newline, separator, name):
    newline, quoting = dialect
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, order, delimiter=separator, lineterminator=newline, quoting=quoting)
    writer.writeheader()
    for row in rows:
        if blank_lines:
            buffer.write(newline)
        writer.writerow(row._asdict() | {"source": "x, y"})
    text = buffer.getvalue()
    if not last_newline:
        text = text.removesuffix(newline)
    assert read_pairs(put(folder, ("\ufeff" if bom else "") + text, name), require_reject=False) == rows


@given(rows=row_lists, separator=st.sampled_from(SEPARATORS), newline=st.sampled_from(["\n", "\r\n", "\r"]),
       before=st.sampled_from([" ", "   "]), behind=st.sampled_from(["", " "]))
def test_spaces_around_quoted_fields_are_no_part_of_them(folder, rows, separator, newline, before, behind):
    """`"q", "a b"`, as people write it, and `"q" , "a b"`."""
    fields = [['"' + text.replace('"', '""') + '"' for text in row] for row in (Row._fields, *rows)]
    text = "".join((behind + separator + before).join(line) + behind + newline for line in fields)
    if not behind:  # of spaces before a quote the csv module knows too
        spaced = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        assert list(map(tuple, spaced))[1:] == rows
    assert read_pairs(put(folder, text), require_reject=False) == rows


@pytest.mark.parametrize(("line", "row"), [
    ('p, c ,r', ("p", " c ", "r")),
    ('"p", "c, ""c""\n, ""c""", r', ("p", 'c, "c"\n, "c"', " r")),
    ('p, "c" he said,r', ("p", ' "c" he said', "r")),  # no quoted field: the quote does not end where the field does
    ('"p ""x"" , ""y""", c "z",r', ('p "x" , "y"', ' c "z"', "r")),
    (' "p" ,"c", "r" ', ("p", "c", "r")),
])
def test_spaces_of_unquoted_fields_stay(folder, line, row):
    assert read_pairs(put(folder, f"prompt, chosen, reject\n{line}\n{line}"), require_reject=False) == [Row(*row)] * 2


@pytest.mark.parametrize(("name", "header", "line"), [
    ("a.csv", "prompt\tchosen\tnotes, etc.", "p\tc, c\tr"), ("a.csv", "id;prompt;chosen", "1;p;c, c"),
    ("a.tsv", "prompt,chosen", 'p,"c, c"'), ("a.tsv", "text, prompt\tprompt\tchosen", "x\tp\tc, c"),
    ("a.csv", "prompt,chosen,a;b;c;d", "p,\"c, c\",1"), ("a.csv", "prompt,chosen,a\tb", "p,\"c, c\",1"),
    ("a.csv", '"id|x"|prompt|chosen', "1|p|c, c"), ("a.csv", "sep=;\r\nid;prompt;chosen", "1;p;c, c"),
    ("a.csv", '"sep=\t"\n\nPrompt\tChosen', "p\tc, c"),
])
def test_the_header_tells_the_separator(folder, name, header, line):
    assert read_pairs(put(folder, f"{header}\n{line}\n", name), require_reject=False) == [Row("p", "c, c", "")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_of_unicode_with_their_mark(folder, encoding):
    """Excel's "Unicode text" is UTF-16 with tabs."""
    mark = "\ufeff" if encoding.endswith("be") else ""
    text = f"{mark}prompt\tchosen\treject\r\né😀\t日本\tr"
    assert read_pairs(put(folder, text.encode(encoding)), require_reject=True) == [Row("é😀", "日本", "r")]
    message = refusal(folder, text.encode(encoding)[:-1])
    assert message.startswith("the file: byte 0x") and f"is not {encoding[:6].upper()}; save the file as UTF-8" in message


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
    for name, separator in (("theirs.csv", ","), ("theirs.tsv", "\t"), ("tabs.csv", "\t"), ("semicolons.csv", ";")):
        pd.DataFrame(rows).to_csv(folder / name, index=False, sep=separator)
        assert read_pairs(folder / name, require_reject=False) == rows


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
    ("prompt\tanswer\na\tb\n", "the header (separated by tabs) lacks chosen (found: prompt, answer)", "prompt,chosen,reject"),
    ("id;b\na;b\n", "the header (separated by semicolons) lacks prompt and chosen (found: id, b)", ""),
    ("id:b\na:b\n", "the header lacks prompt and chosen (found: id:b)", ""),
    ("prompt\tchosen\np,c\n", "row 1 has 1 fields where the header has 2, separated by tabs; put texts that hold tabs", ""),
    ("prompt|chosen\np|c\np|c|d\n", "row 2 has 3 fields where the header has 2, separated by vertical bars", ""),
    ('prompt\tchosen\np\tc\n"p"x\tc\n', "row 2: a quoted field is not closed properly ('tab' expected", "twice"),
    ('prompt, chosen\n"p", "c\nc"\n"p", "c\n\0"', "row 2: holds a NUL character", ""),
    ("prompt,chosen,prompt\na,b,c\n", "the header has the column prompt more than once", ""),
    (HEADER + 'p,c,r\n\n"a\nb",c,r\np, \t,r\n', "row 3 has an empty chosen", ""),
    (HEADER + "p,c,r\n,c,r\n", "row 2 has an empty prompt", ""),
    (HEADER + "p,c,r\np,c\n", "row 2 has 2 fields where the header has 3", "double quotes"),
    (HEADER + "p,c,r\np,c,r,s\n", "row 2 has 4 fields where the header has 3", "double quotes"),
    (HEADER + 'p,c,r\np,"c,r\np,c,r\n', "row 2: a quoted field is not closed", "twice"),
    (HEADER + 'p,c,r\np,"c,r\np,"c",r\n', "row 2: a quoted field is not closed", "twice"),
    ('prompt,"chosen,reject\np,c,r\n', "the header: a quoted field is not closed", "twice"),
    (HEADER + 'p,"c\nc",r\np,"a\0b",r\n', "row 2: holds a NUL character", "UTF-8"),
    (HEADER.encode() + 'p,"c\n\né",r\n'.encode() + b"p,\xe9,r\n", "row 2: byte 0xe9 is not UTF-8",
     "save the file as UTF-8"),
    (HEADER.encode() + b'p,"c\n\xff', "row 1: a quoted field is not closed", ""),
    (HEADER.encode() + b"p,c,r\n\xffp,c,r", "row 2: byte 0xff is not UTF-8", ""),
    (b"\xef\xbb\xbf" + HEADER.encode() + b"p,c\xff,r\n", "row 1: byte 0xff is not UTF-8", ""),
    (HEADER.encode() + b"p,c,r\np,c,r\n\xff", "row 3: byte 0xff", ""), ("sep=;\nprompt;chosen\np;\0", "row 1: holds a NUL", ""),
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
