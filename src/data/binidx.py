"""Tokenized corpora as RWKV-LM, GPT-NeoX and Megatron-LM write them: `NAME.bin`, the tokens, and `NAME.idx`, their borders.

An index holds, little-endian and without gaps: MAGIC; version (uint64, 1); the code of the tokens' type (uint8); the number of
entries and that of document borders (uint64 each); each entry's number of tokens (int32) and its first byte in the .bin (int64);
and the borders (int64): document d is the entries from border d up to border d + 1. RWKV-LM's tools write each document as one
entry that ends with the end-of-text token, 0. Others write a whole corpus as one entry, with that token between documents;
Megatron-LM may write a document as several entries, and ends it with that token only if told to.

The files may be larger than memory: tokens are read through a memory map, and copied only as texts are used.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from src.data.packing import Sizes, Text, sizes_of_texts
from src.errors import UserError
from src.files import existing_file

MAGIC = b"MMIDIDX\0\0"
ENDINGS = (".bin", ".idx")
_HEADER = struct.Struct(f"<{len(MAGIC)}sQBQQ")
_OLD_MAGIC = b"TNTIDX\0\0"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
_AT_ONCE = 1 << 22  # tokens looked at at a time


class Corpus(NamedTuple):
    """The pair of files."""

    tokens: Path  # NAME.bin
    borders: Path  # NAME.idx


class Pieces(Sequence[Text]):
    """Texts that are stretches of a memory map; each is copied on access. Every token has a loss except the first."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self._tokens, self._starts, self._ends = tokens, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, at: int) -> Text: ...

    @overload
    def __getitem__(self, at: slice) -> "Pieces": ...

    def __getitem__(self, at: int | slice) -> "Text | Pieces":
        if isinstance(at, slice):
            return Pieces(self._tokens, self._starts[at], self._ends[at])
        tokens = self._tokens[self._starts[at]:self._ends[at]].tolist()
        return Text(tokens, [True] * len(tokens))

    def losses(self) -> np.ndarray:
        """[n] int64: tokens of each text that have a loss."""
        return self._ends - self._starts - 1

    def sizes(self) -> Sizes:
        return sizes_of_texts(self._ends - self._starts)


class Found(NamedTuple):
    """What `read_corpus` found."""

    pieces: Pieces
    documents: int  # of two tokens or more
    cut: int  # of these, cut into several pieces


def corpus_at(path: str | Path) -> Corpus | None:
    """The two files that `NAME.bin`, `NAME.idx`, or `NAME` without a file of that name stands for; None for any other path."""
    path = Path(path)
    if path.suffix.lower() in ENDINGS:
        return Corpus(*(path if path.suffix.lower() == ending else path.with_suffix(ending) for ending in ENDINGS))
    if not path.name or path.exists():  # "/" and "." have no name
        return None
    both = Corpus(*(path.with_name(f"{path.name}{ending}") for ending in ENDINGS))
    return both if all(map(Path.is_file, both)) else None


def read_corpus(corpus: Corpus, end_of_text: int, vocab_size: int, max_len: int) -> Found:
    """The documents of a corpus in pieces of at most `max_len` inputs, as those of a .txt are cut; tokens as they are.

    A document also ends behind each `end_of_text`. One without two tokens has nothing to predict, and is left out.

    Raises:
        UserError: a file is missing or damaged, or they do not belong together; a token is beyond the vocabulary.
    """
    for path, other in (corpus, corpus[::-1]):
        if path.exists() and not other.exists():
            raise UserError(f"{path}: {other.name} is missing next to it; a tokenized corpus is both files")
    for path in corpus:
        existing_file(path, "--train_data_file or --eval_file")
    tokens, borders = _mapped(corpus)
    ends = _ends_inside(tokens, borders, end_of_text, vocab_size, corpus.tokens)
    borders = np.union1d(borders, ends)
    starts, inputs = borders[:-1], np.diff(borders) - 1
    starts, inputs = starts[inputs > 0], inputs[inputs > 0]
    if not len(starts):
        raise UserError(f"{corpus.tokens}: has no document of two tokens or more, so there is nothing to train on")
    in_pieces = -(-inputs // max_len)
    number = np.arange(in_pieces.sum()) - np.repeat(np.cumsum(in_pieces) - in_pieces, in_pieces)
    first = np.repeat(starts, in_pieces) + number * max_len
    last = np.minimum(first + max_len, np.repeat(starts + inputs, in_pieces))
    return Found(Pieces(tokens, first, last + 1), len(starts), int((in_pieces > 1).sum()))


def _mapped(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [T], and the borders of documents in them, from 0 to T."""
    path, size = corpus.borders, corpus.borders.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if head.startswith(_OLD_MAGIC):
        raise UserError(f"{path}: is an index in fairseq's older format; make the corpus again with --dataset-impl mmap")
    if not head.startswith(MAGIC) or len(head) < _HEADER.size:
        raise UserError(f"{path}: is not the index of a tokenized corpus, which begins with MMIDIDX; it is damaged or of another "
                        "kind")
    _, version, code, n_entries, n_borders = _HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{path}: is an index of version {version}, and only 1 can be read")
    if code not in _TYPES:
        raise UserError(f"{path}: has tokens of type {code}, which are not whole numbers; make the corpus again with uint16")
    expected = _HEADER.size + 12 * n_entries + 8 * n_borders
    if size != expected:
        raise UserError(f"{path}: has {size} bytes where its header announces {expected}; it is damaged or cut off")
    if not n_entries:
        raise UserError(f"{path}: has no documents, so there is nothing to train on")
    index = np.memmap(path, np.uint8, mode="r", offset=0)
    parts = np.split(index[_HEADER.size:], np.cumsum([4 * n_entries, 8 * n_entries]))
    sizes, pointers, documents = (part.view(kind) for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True))
    kind = np.dtype(_TYPES[code])
    ends = _entry_ends(sizes, pointers, kind.itemsize, path)
    n_bytes, described = corpus.tokens.stat().st_size, int(ends[-1]) * kind.itemsize
    if n_bytes != described:
        raise UserError(f"{corpus.tokens}: has {n_bytes} bytes where {path.name} describes {described}; one of them is cut off, "
                        "or they do not belong together")
    if not n_bytes:
        raise UserError(f"{corpus.tokens}: has no tokens, so there is nothing to train on")
    return np.memmap(corpus.tokens, kind, mode="r"), np.concatenate(([0], ends))[_document_borders(documents, n_entries, path)]


def _entry_ends(sizes: np.ndarray, pointers: np.ndarray, itemsize: int, path: Path) -> np.ndarray:
    """[n] int64: where each entry ends, in tokens. Entries must follow one another, as every tool writes them."""
    if sizes.min() < 0:
        raise UserError(f"{path}: entry {int(sizes.argmin()) + 1} has {sizes.min()} tokens; the index is damaged")
    ends = np.cumsum(sizes, dtype=np.int64)
    wrong = pointers != (ends - sizes) * itemsize
    if wrong.any():
        at = int(wrong.argmax())
        raise UserError(f"{path}: entry {at + 1} begins at byte {pointers[at]} where the ones before it end at byte "
                        f"{(int(ends[at]) - int(sizes[at])) * itemsize}; the index is damaged")
    return ends


def _document_borders(documents: np.ndarray, n_entries: int, path: Path) -> np.ndarray:
    """The borders of documents, in entries. A tool that knows no documents writes at most the first."""
    if len(documents) < 2:
        return np.arange(n_entries + 1)
    if documents[0] != 0 or documents[-1] != n_entries or (documents[1:] < documents[:-1]).any():
        raise UserError(f"{path}: its borders of documents do not rise from 0 to its {n_entries} entries; the index is damaged")
    return documents


def _ends_inside(tokens: np.ndarray, borders: np.ndarray, end_of_text: int, vocab_size: int, path: Path) -> np.ndarray:
    """The places behind each end-of-text token. Raises UserError for a token beyond the vocabulary."""
    ends = []
    for start in range(0, len(tokens), _AT_ONCE):
        part = tokens[start:start + _AT_ONCE]
        if part.min() < 0 or part.max() >= vocab_size:
            at = start + int(((part < 0) | (part >= vocab_size)).argmax())
            document = int(np.searchsorted(borders, at, side="right"))
            raise UserError(f"{path}: document {document} has the token {tokens[at]} (number {at + 1} of the file), and the "
                            f"vocabulary has {vocab_size}; choose the --tokenizer that the corpus was made with")
        ends.append(start + 1 + np.flatnonzero(part == end_of_text))
    return np.concatenate(ends)
