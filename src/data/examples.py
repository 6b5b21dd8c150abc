"""From a file of texts to the training data of `--sft 1`: sequences of tokens, and which of them have a loss.

The columns distinguish three kinds of rows: a prompt with its answer, a conversation (a list of messages), and plain text.
Answers have a loss, prompts have none. In plain text every token has a loss except the first, which nothing predicts.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data.binidx import corpus_at, read_corpus
from src.data.columns import (
    ANSWERS,
    CONVERSATIONS,
    PromptColumns,
    Table,
    Usage,
    find_column,
    find_prompt_columns,
    flag_columns,
    known_columns,
    read_cell,
    read_records,
    require_rows,
)
from src.data.conversation import ASSISTANT, Turn, prompt_turns, read_transcript
from src.data.faults import BadRow, Reading, report_reading, skipped_rows, usable
from src.data.fit import conversations, fitted, render_ahead
from src.data.kinds import check_kind
from src.data.packing import Text
from src.data.prompts import read_prompt, read_system, with_system
from src.data.read import read_table
from src.data.rows import split_answer, without_prompt
from src.data.source import data_ending, data_file, open_data, open_text
from src.data.spill import Spill
from src.data.templates import CLASSIC, Template, draw_form
from src.data.thinking import thinking_tokens
from src.data.token_lists import Texts
from src.data.tokenize import cut_beginning
from src.errors import UserError
from src.progress import bar_if_long
from src.tokenizer import Tokenizer
from src.tokenizer.fidelity import Changes, Encoder

_ANSWERS = ("chosen", *ANSWERS, "chosen_messages", "chosen_response")
TEXT = "text"
# End of a document within a .txt: the character 0, or the word that many corpora use for it.
_END = re.compile(r"\0|<\|endoftext\|>")
_LONGEST_END = len("<|endoftext|>")
_PIECE = 1 << 20  # characters read at a time


class Example(NamedTuple):
    """A conversation; the assistant's turns from number `first` on have a loss, and the last of them is its end."""

    turns: list[Turn]
    first: int


@dataclass(frozen=True)
class TextCounts:
    """What a file was turned into."""

    rows: int  # conversations, or documents
    trained: int  # tokens that have a loss
    cut: int  # texts of conversations that lost their beginning, or documents that were cut into pieces
    dropped: int  # texts of conversations left out, since an answer alone is longer than the limit
    changes: Changes  # texts that do not come back from their tokens as written
    skipped_rows: dict[str, Any]  # rows that can't be used: "count", and "rows" by kind


def read_texts(path: str | Path, tokenizer: Tokenizer, max_len: int, seed: int, on_prompt: bool, skip_bad_rows: bool = False,
               template: Template = CLASSIC, loss_on: str = "all") -> tuple[Sequence[Text], TextCounts]:
    """Read a `.txt` of documents, a tokenized corpus (src/data/binidx.py), or a table (src/data/read.py) of documents, prompts
    with answers, or conversations.

    A conversation is one text, or one for each answer where the template renders earlier answers otherwise. Over `max_len` tokens
    it loses its beginning; one whose last answer alone is longer is dropped. A longer document
    is cut into pieces of `max_len` inputs. Each piece begins with the last token of the piece before it, so that every token of
    the document except the first is predicted once. A document ends with the end-of-text token, and begins with it if the
    template's texts do.

    Args:
        max_len: tokens of a sequence.
        seed: of the template's forms that are drawn for a single prompt with its answer, as for preferences.
        on_prompt: give prompts a loss too.
        skip_bad_rows: leave out rows that can't be used instead of refusing the file.
        loss_on: "answer" leaves the thinking part of an answer out of its loss.

    Raises:
        UserError: the file or a row of it is malformed, both named; no text is left under the limit.
    """
    generator, encoder = np.random.default_rng(seed), Encoder(tokenizer)
    if corpus := corpus_at(path):
        found = read_corpus(corpus, tokenizer.end_of_text, tokenizer.vocab_size, max_len)
        trained = int(found.pieces.losses().sum())
        return found.pieces, TextCounts(found.documents, trained, found.cut, 0, encoder.changes(), {"count": 0, "rows": {}})
    path = data_file(path, "--train_data_file or --eval_file")
    if data_ending(path) == ".txt":
        documents = _read_documents(path)
        reading = Reading(path, documents, range(1, len(documents) + 1), faults=[], notes=[])
    else:
        reading = fitted(read_examples(read_table(path)), template, loss_on)
    rows = usable(reading, skip_bad_rows)
    texts = Texts(tokenizer.vocab_size)
    cut = dropped = 0
    with bar_if_long("texts to tokens", len(rows)) as advance:
        for at, (number, row) in enumerate(zip(reading.numbers, rows, strict=True)):
            render_ahead(template, rows, at)
            advance(1)
            if isinstance(row, str):
                begins = [tokenizer.end_of_text] * template.begins_with_end_of_text
                pieces = list(_document([*begins, *encoder.encode(row, number, "text"), tokenizer.end_of_text], max_len))
                for piece in pieces:
                    texts.append(piece)
                cut += len(pieces) > 1
                continue
            form = draw_form(template, generator)
            for _, turns, first in conversations(row, template):
                text, last = _tokenized(Example(turns, first), number, encoder, template, form, on_prompt, loss_on)
                if last > max_len:
                    dropped += 1
                    continue
                cut += len(text.tokens) > max_len
                keep_first = template.begins_with_end_of_text and last < max_len
                texts.append(Text(*(cut_beginning(part, max_len, keep_first) for part in text)))
    trained = int(texts.losses().sum())
    if not trained:
        raise UserError(f"{path}: nothing is left to train on: {dropped} of {len(texts) + dropped} texts have an answer of over "
                        f"{max_len} tokens; raise --ctx_len")
    report_reading(reading)
    return texts, TextCounts(len(rows), trained, cut, dropped, encoder.changes(), skipped_rows(reading))


def read_examples(table: Table) -> Reading:
    """A table's rows, as conversations or plain strings; rows that can't be used; what has no effect.

    Raises UserError if no column can be trained on, or two could be.
    """
    messages, answer, text = (find_column(table, names) for names in (CONVERSATIONS, _ANSWERS, (TEXT,)))
    if not (messages or answer or text):
        raise UserError(f"{table.path}: {table.where} has no column to train on (found: {known_columns(table)}); the columns "
                        "must be prompt,completion or prompt,chosen or instruction,input,output, or messages, or text")
    require_rows(table)
    prompt, usage = find_prompt_columns(table), Usage()
    flags = flag_columns(table, numbers_are_thumbs=True) if messages or answer else []

    def read(record: dict[str, Any], where: str) -> Example | str:
        if messages:
            return _conversation(record, messages, prompt.system, where, usage)
        if answer:
            return _answered(record, prompt, answer, where, usage)
        value = read_cell(record, text, where, TEXT, usage)
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"no {TEXT}", f"{where} has no {TEXT}; fill it in or remove the row")
        return value

    return read_records(table, flags, usage, read)


def _conversation(record: dict[str, Any], column: str, system: str | None, where: str, usage: Usage) -> Example:
    """All of the assistant's turns have a loss except those of weight 0; turns after the last of them are dropped."""
    turns = read_cell(record, column, where, column, usage)
    if not turns or (isinstance(turns, str) and not turns.strip()):
        raise BadRow("no messages", f"{where} has no messages in {column}; fill it in or remove the row")
    turns = (read_transcript(turns) or []) if isinstance(turns, str) else turns
    usage.open_ended += bool(turns) and turns[-1].speaker != ASSISTANT
    while turns and turns[-1].speaker != ASSISTANT:
        turns = turns[:-1]
    split_answer(turns, f"{where}: its {column}")
    if not any(turn.trained for turn in turns if turn.speaker == ASSISTANT):
        raise BadRow("answer without a loss", f"{where}: its {column} has weight 0 in all of the assistant's messages; "
                                              "remove the row or the weights")
    return Example(with_system(turns, read_system(record, system, where, usage), where), 0)


def _answered(record: dict[str, Any], columns: PromptColumns, column: str, where: str, usage: Usage) -> Example:
    """The last answer has a loss; an answer that is a conversation with its own prompt needs no prompt column."""
    answer = read_cell(record, column, where, column, usage)
    turns = answer if isinstance(answer, list) else None if columns.prompt else read_transcript(answer)
    if turns and len(turns) > 1 and turns[0].speaker != ASSISTANT:
        before, _ = split_answer(turns, f"{where}: its {column}")
        before, after = with_system(before, read_system(record, columns.system, where, usage), where), [turns[-1]]
    else:
        prompt = read_prompt(record, columns, where, usage)
        if not prompt.strip():
            raise BadRow("empty prompt", f"{where} has an empty prompt; fill it in or remove the row")
        answer, _ = without_prompt(answer, "", prompt)
        before, after = prompt_turns(prompt), [Turn(ASSISTANT, answer)] if isinstance(answer, str) else answer
    if after[-1].speaker != ASSISTANT:
        raise BadRow("no answer", f"{where}: its {column} is not the assistant's")
    if not after[-1].text.strip():
        raise BadRow("empty answer", f"{where} has an empty answer (its {column}); fill it in or remove the row")
    if not after[-1].trained:
        raise BadRow("answer without a loss", f"{where}: its {column} has weight 0; remove the row or the weight")
    return Example([*before, *after], len(before))


def _tokenized(example: Example, row: int, encoder: Encoder, template: Template, form: int, on_prompt: bool,
               loss_on: str) -> tuple[Text, int]:
    """Tokens with their losses, and the length of the last answer. Prompts and answers are tokenized apart, as in pairs."""
    tokens: list[int] = []
    trained: list[bool] = []
    last, follows = 0, False
    # What a prompt has of an answer without a loss is not known by its pieces.
    on_prompt = on_prompt and all(turn.trained for turn in example.turns[:example.first])
    for number, piece in enumerate(template.conversation(example.turns, example.first, form), start=1):
        if piece.is_control:
            new = [encoder.control(piece.text)]
        else:
            part = f"{'answer' if piece.is_answer else 'prompt'} (part {number})"
            new, follows = encoder.encode(piece.text, row, part, continues=follows), True
        loss = [piece.may_train and (piece.is_answer or on_prompt)] * len(new)
        if loss_on == "answer" and piece.is_answer:
            thinking = thinking_tokens(new, template.ending, encoder.tokenizer)
            loss[:thinking] = [False] * thinking
        tokens += new
        trained += loss
        # An answer that has no loss is one all the same, and what ends an answer is part of it.
        last = last + len(new) if piece.is_answer or not piece.may_train else 0
    return Text(tokens, trained), last


def _document(tokens: list[int], max_len: int) -> Iterator[Text]:
    for start in range(0, len(tokens) - 1, max_len):
        piece = tokens[start:start + max_len + 1]
        yield Text(piece, [True] * len(piece))


def _read_documents(path: Path) -> Sequence[str]:
    with open_data(path) as stream:
        check_kind(stream, path, as_table=False)
    documents = Spill(document for document in _split(path) if document.strip()).finished()
    if not documents:
        raise UserError(f"{path}: the file is empty; it needs text to train on")
    return documents


def _split(path: Path) -> Iterator[str]:
    """The parts of a file between its ends of documents."""
    parts: list[str] = []  # of the document that goes on
    rest = ""
    with open_text(path, newline="\n", by_line=True) as text:
        while piece := text.read(_PIECE):
            *ended, rest = _END.split(rest + piece)
            for document in ended:
                yield "".join([*parts, document])
                parts = []
            # What could be the beginning of an end waits for the rest of it.
            parts, rest = [*parts, rest[:-_LONGEST_END]], rest[-_LONGEST_END:]
    yield "".join([*parts, rest])
