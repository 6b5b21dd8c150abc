"""Rows to token pairs, most with a tokenizer of one token a byte so that lengths can be counted by eye."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from src.data.csv import Row
from src.data.token_lists import TokenPair
from src.data.tokenize import tokenize_pairs, walk_rows
from src.errors import UserError
from src.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from tests.classic import format_answer, format_prompt
from tests.data.reading import read_pairs
from tests.tokenizer.files import KINDS, saved

pytestmark = pytest.mark.usefixtures("storage")

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
BYTES = ByteTokenizer()

ROWS = [Row("one", "yes", "no"), Row("two\r\n\r\nlines", "maybe", "never"), Row("three", "same ", " same")]


def test_walk_rows_goes_round():
    assert list(walk_rows(3, 8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert list(walk_rows(3, 2)) == [0, 1]
    assert list(walk_rows(3, None)) == [0, 1, 2]


def test_pairs_are_templated_texts_apart():
    pairs, report = tokenize_pairs(ROWS, BYTES, 300, max_len=1000, seed=1)
    assert len(pairs) == 300 == sum(report.templates.values())
    counts = dict.fromkeys(("user", "question", "input"), 0)
    for index, (prompt, chosen, reject, *_) in enumerate(pairs):
        row = ROWS[index % 3]
        assert bytes(chosen).decode() == format_answer(row.chosen)
        assert bytes(reject).decode() == format_answer(row.reject)
        name = {"U": "user", "Q": "question", "I": "input"}[chr(prompt[0])]
        counts[name] += 1
        assert bytes(prompt).decode() == format_prompt(("user", "question", "input").index(name), row.prompt)
    assert report.templates == counts and min(counts.values()) > 0
    assert (report.cut, report.dropped, report.equal) == (0, 0, 100)
    assert report.longest == max(len(prompt) + max(len(chosen), len(reject)) for prompt, chosen, reject, *_ in pairs)


def test_the_seed_alone_decides():
    first = tokenize_pairs(ROWS, BYTES, 50, 1000, seed=7)
    assert tokenize_pairs(ROWS, BYTES, 50, 1000, seed=7) == first
    assert tokenize_pairs(ROWS, BYTES, 50, 1000, seed=8) != first
    assert tokenize_pairs(ROWS, BYTES, 80, 1000, seed=7)[0][:50] == first[0]


@given(lengths=st.lists(st.tuples(*[st.integers(1, 30)] * 3), min_size=1, max_size=5), max_len=st.integers(1, 60),
       seed=st.integers(0, 99))
def test_long_pairs_lose_their_beginning_or_are_dropped(lengths, max_len, seed):
    rows = [Row("p" * a, "c" * b, "r" * c) for a, b, c in lengths]
    whole, _ = tokenize_pairs(rows, BYTES, 12, 10_000, seed)
    expected = []
    for prompt, chosen, reject, *_ in whole:
        longer = max(chosen, reject, key=len)
        if len(longer) > max_len:
            continue
        while len(prompt) + len(longer) > max_len:
            prompt = prompt[1:]
        expected.append((prompt, chosen, reject))
    if not expected:
        with pytest.raises(UserError, match="--rlhf_max_corpus_len"):
            tokenize_pairs(rows, BYTES, 12, max_len, seed)
        return
    pairs, report = tokenize_pairs(rows, BYTES, 12, max_len, seed)
    assert [pair[:3] for pair in pairs] == expected
    assert report.dropped == 12 - len(expected)
    # A whole prompt begins with its template's capital; no other capital comes before the colon.
    assert report.cut == sum(bytes(prompt[:1]) not in (b"U", b"Q", b"I") for prompt, _, _ in expected)
    longest = max(len(prompt) + max(len(chosen), len(reject)) for prompt, chosen, reject in expected)
    assert report.longest == longest <= max_len


def test_an_answer_of_exactly_the_limit_empties_the_prompt():
    pairs, report = tokenize_pairs([Row("prompt", "yes", "n")], BYTES, None, max_len=6, seed=0)
    assert pairs == [TokenPair([], list(b" yes\n\n"), list(b" n\n\n"))]
    assert (report.cut, report.longest) == (1, 6)


def test_an_answer_that_is_not_there_stays_empty():
    rows = [Row("one", "yes", ""), Row("two", "", "no"), Row("three", "yes", "yes"), Row("four", "", "n" * 99)]
    pairs, report = tokenize_pairs(rows, BYTES, None, max_len=50, seed=0)
    assert [(bytes(pair.chosen), bytes(pair.reject)) for pair in pairs] == [(b" yes\n\n", b""), (b"", b" no\n\n"),
                                                                           (b" yes\n\n", b" yes\n\n")]
    assert (report.equal, report.dropped, report.rows) == (1, 1, [0, 1, 2])


def test_a_pair_of_exactly_the_limit_is_whole():
    row = Row("prompt", "yes", "n")
    _, whole = tokenize_pairs([row], BYTES, None, max_len=1000, seed=0)
    for spare, cut in ((0, 0), (-1, 1)):
        _, report = tokenize_pairs([row], BYTES, None, max_len=whole.longest + spare, seed=0)
        assert (report.longest, report.cut) == (whole.longest + spare, cut)


def test_each_text_is_tokenized_once():
    seen = []

    class Counting(ByteTokenizer):
        def encode(self, text: str, continues: bool = False) -> list[int]:
            seen.append(text)
            return super().encode(text, continues)

    tokenize_pairs(ROWS, Counting(), 3000, 1000, seed=0)
    # Two answers and at most three templated prompts a row, however many pairs are made; no text comes twice but
    # the answers of the third row, which are equal once cleaned.
    assert len(seen) == 3 * (2 + 3) and len(set(seen)) == len(seen) - 1


def test_a_target_below_one_is_refused():
    with pytest.raises(UserError, match="--target_pair_count"):
        tokenize_pairs(ROWS, BYTES, 0, 1000, seed=0)


@pytest.mark.skipif(not SHARED.exists(), reason="shared data is not here")
def test_real_pairs_keep_the_limit():
    rows = read_pairs(SHARED / "hh_harmless_pairs.csv", require_reject=True)
    pairs, report = tokenize_pairs(rows, BYTES, None, 512, seed=0)
    assert len(pairs) + report.dropped == 1500 and report.cut > 0 and report.longest == 512


# What a table's cell may hold; control words are no part of it, which the library itself would read as tokens.
CELL = st.text(alphabet=" \nabcdehstuUA:;,.!?'0123456789-é你👍", max_size=25).filter(str.strip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(cells=st.tuples(CELL, CELL, CELL), seed=st.integers(0, 20))
def test_prompt_and_answer_have_the_tokens_of_the_whole_text(kind, cells, seed, tmp_path):
    """By the `tokenizers` library; and both answers follow the very same prompt."""
    path = saved(KINDS[kind](), tmp_path)
    row, library = Row(*cells), Tokenizer.from_file(path)
    [(prompt, chosen, reject, *_)], report = tokenize_pairs([row], HuggingFaceTokenizer(path), None, 1000, seed)
    template = next(number for number, name in enumerate(report.templates) if report.templates[name])
    for tokens, answer in ((chosen, row.chosen), (reject, row.reject)):
        whole = format_prompt(template, row.prompt) + format_answer(answer)
        assert prompt + tokens == library.encode(whole, add_special_tokens=False).ids


def test_the_report_counts_texts_that_the_tokenizer_changes(tmp_path):
    tokenizer = HuggingFaceTokenizer(saved(KINDS["Prepend without bytes"](), tmp_path))
    rows = [Row("one", "yes", "no"), Row("two 你", "好", "no"), Row("three", "yes", "你")]
    _, report = tokenize_pairs(rows, tokenizer, 300, 1000, seed=0)
    changes = report.changes
    assert (changes.looked_at, changes.texts, changes.rows, set(changes.lost)) == (9, 3, (2, 3), {"你", "好"})
    assert tokenize_pairs(rows, BYTES, 300, 1000, seed=0)[1].changes.texts == 0
