"""The RWKV World tokenizer: the longest vocabulary entry at each place, over UTF-8 bytes.

The vocabulary is the text file inside the `rwkv` package (one line an entry: id, Python literal, length in
bytes), and the ids are those of the package's own `TRIE_TOKENIZER`, byte for byte.

The search needs no tree: one dictionary maps every prefix of every entry to the longest entry that the prefix starts
with. A look-up starts with four bytes, and the prefix grows as long as it is found.
"""

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from src.errors import UserError
from src.tokenizer.base import END_OF_TEXT, END_OF_TEXT_IN_RWKV, require_known

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
WORLD_ROWS = 65536
FIRST_LOOK = 4  # bytes; most entries are about that long


class WorldTokenizer:
    """0 ends the text and decodes to nothing; 65530 and up pad the checkpoint and decode to U+FFFD.

    Args:
        rows: of the checkpoint, at most 65536. Entries beyond them are not used; shorter ones replace them.

    Raises UserError if the `rwkv` package, or its vocabulary, is missing or damaged.
    """

    name = "world"
    end_of_text = 0
    control: Mapping[str, int] = MappingProxyType({END_OF_TEXT: 0, END_OF_TEXT_IN_RWKV: 0})
    lossless = True

    def __init__(self, rows: int = WORLD_ROWS) -> None:
        self.vocab_size = rows
        ids = {entry: token for entry, token in _read_vocabulary().items() if token < rows}
        self._bytes = ["\N{REPLACEMENT CHARACTER}".encode()] * self.vocab_size
        self._bytes[self.end_of_text] = b""
        for entry, token in ids.items():
            self._bytes[token] = entry
        self._lengths = [len(entry) for entry in self._bytes]
        self._longest = _longest_entry_of_beginnings(ids)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return self.encode_bytes(text.encode("utf-8", errors="replace"))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes, UTF-8 or not."""
        longest, lengths, size = self._longest.get, self._lengths, len(data)
        tokens: list[int] = []
        start = 0
        while start < size:
            end = start + FIRST_LOOK
            token = longest(data[start:end])
            if token is None:
                while token is None:  # ends at one byte at the latest, since every byte is an entry
                    end -= 1
                    token = longest(data[start:end])
            else:
                while end < size:
                    end += 1
                    longer = longest(data[start:end])
                    if longer is None:
                        break
                    token = longer
            tokens.append(token)
            start += lengths[token]
        return tokens

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        require_known(tokens, self.vocab_size, self.name)
        return b"".join([self._bytes[token] for token in tokens])

    def decode(self, tokens: Sequence[int]) -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


def _longest_entry_of_beginnings(ids: dict[bytes, int]) -> dict[bytes, int]:
    """Map each prefix of each entry to the id of the longest entry that the prefix itself starts with."""
    longest: dict[bytes, int] = {}
    for entry, token in sorted(ids.items(), key=lambda item: len(item[0])):
        known = len(entry) - 1
        while known > 0 and entry[:known] not in longest:
            known -= 1
        # Shorter entries came first, so nothing between `known` and the whole entry is an entry.
        for length in range(known + 1, len(entry)):
            longest[entry[:length]] = longest[entry[:known]]
        longest[entry] = token
    return longest


def _read_vocabulary() -> dict[bytes, int]:
    package = importlib.util.find_spec("rwkv")  # finds the folder without running the package's code
    if package is None or not package.submodule_search_locations:
        raise UserError("the World vocabulary is part of the rwkv package, which is not installed; pip install rwkv")
    path = Path(package.submodule_search_locations[0]) / VOCABULARY_FILE
    try:
        ids = {}
        for line in path.read_text(encoding="utf-8").strip().split("\n"):
            token, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            entry = ast.literal_eval(literal)
            entry = entry.encode("utf-8") if isinstance(entry, str) else entry
            if len(entry) != int(length):
                raise ValueError(f"entry {token} is not {length} bytes long")
            ids[entry] = int(token)
        if not all(bytes([byte]) in ids for byte in range(256)):
            raise ValueError("not every byte is an entry")
    except (OSError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"{path}: not a World vocabulary ({error}); install the rwkv package again") from error
    return ids
