"""Reports what a file of pairs holds before anything is made of it: counts, lengths in tokens, a histogram."""

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from src.console import printable, say, show
from src.data.conversation import prompt_turns
from src.data.faults import NAMED, Reading, name_rows, skipped_rows
from src.data.fit import has_turn_inside, render_ahead
from src.data.rows import Row
from src.data.shown_pair import pair_as_read, print_pair, text_as_read
from src.data.templates import CLASSIC, Template, answer_pieces, prompt_pieces, text_of
from src.data.thinking import has_thinking
from src.data.tokenize import tokenize_pairs
from src.progress import bar_if_long
from src.tokenizer import Tokenizer
from src.tokenizer.fidelity import Changes

BINS = 12  # at most
BEGINNING = 200  # characters
# More tokens than any text has: nothing is cut.
ENDLESS = sys.maxsize


def check_pairs(reading: Reading, tokenizer: Tokenizer, max_len: int, seed: int, template: Template = CLASSIC,
                loss_on: str = "all") -> dict[str, Any]:
    """What preparing each of these rows once would give.

    Args:
        reading: its rows all have a reject, and the template renders them.
        max_len: `--rlhf_max_corpus_len`, tokens of prompt and longer answer together.
        seed: of the template's forms.
        loss_on: as in `tokenize_pairs`.

    Returns:
        rows (those that can be used), pairs (more than those, of lists), conversations (prompts of several turns, or with a
        system message), most_turns;
        bad_rows: "count", and under "rows" the numbers of those that can't be used, by kind; notes: what has no effect;
        thumbs or lists, of a file of these: what the rows were made of;
        tokens: of "prompt", "chosen", "reject" and "pair" (the prompt with the longer answer), as min, median, mean, p95 and max;
        duplicate_rows (all three texts equal an earlier row's), duplicate_prompts (only the prompt does), equal_answers, cut,
        dropped: counts, all of texts as the model reads them; thinking (an answer begins with <think>), turn_names (an answer has
        what begins or ends a turn of the template inside); under `..._at` the first rows of each kind, from 1, as in the file;
        changes: texts that do not come back from their tokens as written (`Changes`);
        template: its name and fingerprint; shown: the first pair that is not dropped, by tokens (`pair_as_read`), and its row;
        begins: the beginning of the first prompt and its chosen answer; histogram: of the pairs' lengths, with `counts` of those
        from one of the `edges` to below the next.
    """
    rows, numbers = reading.rows, reading.numbers
    pairs, report = tokenize_pairs(rows, tokenizer, None, ENDLESS, seed, numbers, template, loss_on)
    prompt, chosen, reject = pairs.lengths()
    longer = np.maximum(chosen, reject)
    lengths = {"prompt": prompt, "chosen": chosen, "reject": reject, "pair": prompt + longer}
    texts = _look_at_texts(rows, template)
    number_of = np.fromiter(numbers, np.int64, len(numbers))
    first = np.flatnonzero(np.diff(number_of, prepend=0))  # of a list's pairs, which share their prompt
    kinds = {
        "duplicate_rows": _repeated(texts.rows), "duplicate_prompts": first[_repeated(texts.prompts[first])],
        "equal_answers": np.flatnonzero(texts.equal_answers),
        "cut": np.flatnonzero((lengths["pair"] > max_len) & (longer <= max_len)),
        "dropped": np.flatnonzero(longer > max_len),
        "thinking": np.flatnonzero(texts.thinking), "turn_names": np.flatnonzero(texts.turn_names),
    }
    kept = np.flatnonzero(longer <= max_len)
    shown = int(kept[0]) if len(kept) else None
    counts, edges = _histogram(lengths["pair"])
    return {
        "rows": len(first), "pairs": len(rows), "conversations": int((texts.turns[first] > 1).sum()),
        "most_turns": int(texts.turns.max()) + 1, "max_len": max_len, "tokenizer": tokenizer.name,
        "template": {"name": template.name, "fingerprint": template.fingerprint},
        "shown": None if shown is None else {
            "row": numbers[shown], **pair_as_read(pairs[shown], tokenizer, max_len, template.begins_with_end_of_text)},
        "bad_rows": skipped_rows(reading), "notes": reading.notes, **(reading.facts or {}),
        "tokens": {name: _spread(values) for name, values in lengths.items()},
        "begins_at": numbers[0], "begins": _beginning(rows[0], tokenizer, template),
        **{name: len(found) for name, found in kinds.items()},
        **{f"{name}_at": np.unique(number_of[found])[:NAMED].tolist() for name, found in kinds.items()},
        "changes": asdict(report.changes), "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def print_check(path: str, found: dict[str, Any], first_of_kind: dict[str, str]) -> None:
    """Print a table and a histogram on stderr, and the same as one line of JSON on stdout.

    Args:
        first_of_kind: by kind, what is wrong with the first bad row of that kind.
    """
    made = "" if found["pairs"] == found["rows"] else f", {found['pairs']} pairs"
    table = Table("tokens", *(name for name in found["tokens"]["pair"]), title=printable(f"{path}: {found['rows']} rows{made}"))
    for name, spread in found["tokens"].items():
        table.add_row({"pair": "prompt + longer answer"}.get(name, name), *(f"{value:.5g}" for value in spread.values()))
    show(table, stderr=True)
    words = {
        "conversations": f"of several turns or with a system message, up to {found['most_turns']} turns",
        "duplicate_rows": "repeat a row before them", "duplicate_prompts": "repeat a prompt",
        "equal_answers": "have equal answers, so no preference to learn",
        "cut": f"longer than {found['max_len']} tokens: the prompt would lose its beginning",
        "dropped": f"have an answer alone longer than {found['max_len']} tokens: they would be dropped",
        "thinking": "have an answer with a thinking part, <think>...</think>",
        "turn_names": "have an answer with what begins or ends a turn inside, by --template "
                      f"{found['template']['name']}: a model that learns it runs on, or breaks off",
    }
    if found["shown"]:
        say(f"row {found['shown']['row']} as the model reads it, by tokens; what carries the loss is underlined in a terminal:")
        print_pair(found["shown"])
    say(f"row {found['begins_at']} begins, as the model reads it: {found['begins']!r}")
    for name, text in words.items():
        at = found.get(f"{name}_at", [])
        more = ", ..." if len(at) == NAMED < found[name] else ""
        named = f" (rows {', '.join(map(str, at))}{more})" if at else ""
        say(f"{found[name]:8} {text}{named}")
    for kind, numbers in found["bad_rows"]["rows"].items():
        say(f"{len(numbers):8} can't be used, {kind}: {name_rows(numbers)}; the first: {first_of_kind[kind]}")
    Changes(**found["changes"]).report(path, found["tokenizer"])
    say("tokens of a pair (prompt + longer answer):")
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        say(f"{low:8} to {high - 1:8} {count:8} {'█' * -(-40 * count // max(counts))}")
    print(json.dumps({"file": path, **found}))


class _Texts(NamedTuple):
    """What the texts of n rows are, as the model reads them."""

    turns: np.ndarray  # [n] int64, of the prompt
    prompts: np.ndarray  # [n] of 16 bytes: a digest of each prompt
    rows: np.ndarray  # [n] of 16 bytes: of all three texts
    equal_answers: np.ndarray  # [n] bool, like the two that follow
    thinking: np.ndarray  # an answer begins with <think>
    turn_names: np.ndarray  # an answer has what begins or ends a turn of the template inside


def _look_at_texts(rows: Sequence[Row], template: Template) -> _Texts:
    turns, prompts, triples, equal, thinking, names = array("q"), bytearray(), bytearray(), bytearray(), bytearray(), bytearray()
    with bar_if_long("rows as the model reads them", len(rows)) as advance:
        for at, row in enumerate(rows):
            render_ahead(template, rows, at)
            prompt = text_of(prompt_pieces(template, row.prompt))
            chosen, reject = (text_of(answer_pieces(template, row.prompt, answer)) if answer.strip() else ""
                              for answer in (row.chosen, row.reject))
            turns.append(len(prompt_turns(row.prompt)))
            prompts += _digest(prompt)
            triples += _digest(prompt, chosen, reject)
            equal.append(chosen == reject)
            thinking.append(has_thinking(row.chosen) or has_thinking(row.reject))
            names.append(has_turn_inside(row, template))
            advance(1)
    of_prompts, of_rows = (np.frombuffer(found, "V16") for found in (prompts, triples))
    is_equal, has_thoughts, has_names = (np.frombuffer(found, bool) for found in (equal, thinking, names))
    return _Texts(np.frombuffer(turns, np.int64), of_prompts, of_rows, is_equal, has_thoughts, has_names)


def _beginning(row: Row, tokenizer: Tokenizer, template: Template) -> str:
    """Of the row's prompt and its chosen answer."""
    answer = answer_pieces(template, row.prompt, row.chosen) if row.chosen.strip() else []
    return text_as_read([*prompt_pieces(template, row.prompt), *answer], tokenizer)[:BEGINNING]


def _digest(*texts: str) -> bytes:
    """16 bytes that are different for different texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _repeated(digests: np.ndarray) -> np.ndarray:
    """The positions of those that occurred before."""
    _, first = np.unique(digests, return_index=True)
    return np.delete(np.arange(len(digests)), first)


def _histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of bins of equal width, in whole numbers."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // BINS)
    return np.histogram(values, np.arange(low, high + width + 1, width))


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "mean": float(values.mean()),
            "p95": float(np.percentile(values, 95)), "max": int(values.max())}
