"""From a file of texts to what is trained on with `--sft 1`: sequences of tokens, and which of them have a loss.

Three kinds of rows, told by the columns: a prompt and its answer, a conversation (a list of messages), or plain text. Answers
have a loss, prompts have none; of plain text every token has one but the first, which nothing comes before.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.files import existing_file
from src.preference.conversation import ASSISTANT, HUMAN, Turn, prompt_turns, read_transcript
from src.preference.packing import Text
from src.preference.read import read_table
from src.preference.rows import Table, find_column, known_columns, read_cell, require_rows, split_answer
from src.preference.templates import draw_template, format_conversation
from src.tokenizer import Tokenizer
from src.tokenizer.fidelity import Changes, Encoder

MESSAGES = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", "question")
ANSWERS = ("chosen", "completion", "response", "output", "answer")
INPUT = "input"  # what an instruction is about, beside it
TEXT = "text"
# What ends a document within a .txt: the character 0, or the word that many corpora have for it.
_END = re.compile(r"\0|<\|endoftext\|>")


class Example(NamedTuple):
    """A conversation; the assistant's turns from number `first` on have a loss, and the last of them is its end."""

    turns: list[Turn]
    first: int


@dataclass(frozen=True)
class Report:
    """What became of a file."""

    rows: int  # conversations, or documents
    trained: int  # tokens that have a loss
    cut: int  # conversations that lost their beginning, or documents that were cut into pieces
    dropped: int  # conversations left out since an answer alone is longer than the limit
    changes: Changes  # texts that do not come back from their tokens as written


def read_texts(path: str | Path, tokenizer: Tokenizer, max_len: int, seed: int, on_prompt: bool) -> tuple[list[Text], Report]:
    """Read a `.txt` of documents, or a CSV, JSONL or Parquet of documents, prompts with answers, or conversations.

    A conversation over `max_len` tokens loses its beginning; one whose last answer is longer by itself is dropped. A document of
    more is cut into pieces of `max_len` inputs, each of which begins with the last token of the piece before it, so that every
    token of the document but the first is predicted once. A document ends with the end-of-text token.

    Args:
        max_len: tokens of a sequence.
        seed: of the templates, which a single prompt with its answer is put in as for preferences.
        on_prompt: give prompts a loss too.

    Raises:
        UserError: a file or row that is not as it should be, both named; nothing is left under the limit.
    """
    path = existing_file(path, "--train_data_file or --eval_file")
    if path.suffix.lower() == ".txt":
        rows: Sequence[Example | str] = _read_documents(path)
    else:
        rows = read_examples(read_table(path))
    generator, encoder = np.random.default_rng(seed), Encoder(tokenizer)
    texts: list[Text] = []
    cut = dropped = 0
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            pieces = list(_document([*encoder.encode(row, number, "text"), tokenizer.end_of_text], max_len))
            texts += pieces
            cut += len(pieces) > 1
            continue
        text, last = _tokenized(row, number, encoder, draw_template(generator), on_prompt)
        if last > max_len:
            dropped += 1
            continue
        cut += len(text.tokens) > max_len
        texts.append(Text(text.tokens[-max_len:], text.trained[-max_len:]))
    if not any(any(text.trained[1:]) for text in texts):
        raise UserError(f"{path}: nothing is left to train on: {dropped} of {len(rows)} rows have an answer of over {max_len} "
                        "tokens; raise --ctx_len")
    trained = sum(sum(text.trained[1:]) for text in texts)
    return texts, Report(len(rows), trained, cut, dropped, encoder.changes())


def read_examples(table: Table) -> list[Example | str]:
    """A table's rows: conversations, or documents as plain strings."""
    messages, prompt, answer, text, about = (
        find_column(table, names) for names in (MESSAGES, PROMPTS, ANSWERS, (TEXT,), (INPUT,)))
    if not (messages or answer or text):
        raise UserError(f"{table.path}: {table.where} lacks what to train on (found: {known_columns(table)}); the columns must "
                        "be prompt,completion or prompt,chosen or instruction,input,output, or messages, or text")
    require_rows(table)
    examples: list[Example | str] = []
    for number, record in enumerate(table.records, start=1):
        where = f"{table.path}: row {number}"
        if messages:
            examples.append(_conversation(read_cell(record, messages, where, messages), where, messages))
        elif answer:
            cells = (read_cell(record, column, where, column or "prompt") for column in (prompt, about, answer))
            examples.append(_answered(*cells, where))
        else:
            value = read_cell(record, text, where, TEXT)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where} has no {TEXT}; fill it in or remove the row")
            examples.append(value)
    return examples


def _conversation(turns: str | list[Turn], where: str, column: str) -> Example:
    """All of the assistant's turns have a loss; what comes after the last of them has no use."""
    turns = (read_transcript(turns) or []) if isinstance(turns, str) else turns
    while turns and turns[-1].speaker != ASSISTANT:
        turns = turns[:-1]
    split_answer(turns, f"{where}: its {column}")
    return Example(turns, 0)


def _answered(prompt: str | list[Turn], about: str | list[Turn], answer: str | list[Turn], where: str) -> Example:
    """The last answer has a loss; one that is a conversation with its prompt before it needs no other prompt."""
    turns = answer if isinstance(answer, list) else None if prompt else read_transcript(answer)
    if turns and len(turns) > 1 and turns[0].speaker != ASSISTANT:
        before, last = split_answer(turns, f"{where}: its answer")
        return Example([*before, Turn(ASSISTANT, last)], len(before))
    before = prompt_turns(prompt) if isinstance(prompt, str) else prompt
    if isinstance(about, str) and about.strip():
        before = [*before[:-1], Turn(HUMAN, f"{before[-1].text}\n{about}")]
    after = [Turn(ASSISTANT, answer)] if isinstance(answer, str) else answer
    if not before[-1].text.strip() or before[-1].speaker != HUMAN:
        raise UserError(f"{where} has an empty prompt, or one that ends in no user's message; fill it in or remove the row")
    if not after[-1].text.strip() or after[-1].speaker != ASSISTANT:
        raise UserError(f"{where} has an empty answer, or one that is not the assistant's; fill it in or remove the row")
    return Example([*before, *after], len(before))


def _tokenized(example: Example, row: int, encoder: Encoder, template: int, on_prompt: bool) -> tuple[Text, int]:
    """Tokens with their losses, and how many the last answer has. Prompts and answers are tokenized apart, as in pairs."""
    tokens: list[int] = []
    trained: list[bool] = []
    piece: list[int] = []
    for number, (text, is_answer) in enumerate(format_conversation(example.turns, example.first, template), start=1):
        piece = encoder.encode(text, row, f"{'answer' if is_answer else 'prompt'} (part {number})", continues=number > 1)
        tokens += piece
        trained += [is_answer or on_prompt] * len(piece)
    return Text(tokens, trained), len(piece)


def _document(tokens: list[int], max_len: int) -> Iterator[Text]:
    for start in range(0, len(tokens) - 1, max_len):
        piece = tokens[start:start + max_len + 1]
        yield Text(piece, [True] * len(piece))


def _read_documents(path: Path) -> list[str]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; "
                        "save the file as UTF-8") from None
    documents = [document for document in _END.split(text) if document.strip()]
    if not documents:
        raise UserError(f"{path}: the file is empty; it needs text to train on")
    return documents
