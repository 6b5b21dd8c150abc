"""One reader for every format of pairs: recognized by the first bytes where possible, else by the file's ending."""

from pathlib import Path

from src.data.arrow import read_arrow, read_parquet
from src.data.binidx import corpus_at
from src.data.columns import Table
from src.data.csv import has_known_header, read_csv
from src.data.faults import Reading
from src.data.jsonl import looks_like_json, read_json
from src.data.kinds import check_kind, is_arrow, is_parquet
from src.data.preferences import to_rows
from src.data.ranking import DEFAULT_RULE, PairRule
from src.data.source import data_ending, data_file, open_data
from src.errors import UserError

_ARROW_ENDINGS = (".arrow", ".feather")
_JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
_TAB_ENDINGS = (".tsv", ".tab")


def read_table(path: str | Path) -> Table:
    """The file's columns and rows, not yet interpreted.

    Parquet, Arrow and JSON are recognized under any name; any other text is CSV, unless its ending is JSON's.

    Raises:
        UserError: the file is missing, damaged, not in Unicode, of a kind that can't be read, or malformed; the message names the
            file, and the row if there is one.
    """
    if (corpus := corpus_at(path)) and all(map(Path.is_file, corpus)):
        raise UserError(f"{path}: is a tokenized corpus (binidx), which only train.py --sft 1 takes; give the texts themselves, "
                        "as CSV, JSONL or Parquet")
    path = data_file(path, "data file")
    ending = data_ending(path)
    with open_data(path) as stream:
        head = check_kind(stream, path)
    if is_arrow(head) or (ending in _ARROW_ENDINGS and not is_parquet(head)):
        return read_arrow(path)
    if is_parquet(head) or ending == ".parquet":
        return read_parquet(path)
    return read_json(path) if _is_json(path, ending) else read_csv(path, tabs_first=ending in _TAB_ENDINGS)


def read_pairs(path: str | Path, require_reject: bool, rule: PairRule = DEFAULT_RULE) -> Reading:
    """All rows of a file of preferences, and those that can't be used. A single answer with a thumb is a row with one answer.

    Args:
        require_reject: True if every row must be a preference; False if rejected answers may be empty or absent.
        rule: which pairs lists of scored answers make.

    Raises:
        UserError: the file as a whole can't be used.
    """
    return to_rows(read_table(path), require_reject, rule)


def _is_json(path: Path, ending: str) -> bool:
    return looks_like_json(path) or (ending in _JSON_ENDINGS and not has_known_header(path))
