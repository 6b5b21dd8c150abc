"""Any Hugging Face `tokenizer.json`, through the `tokenizers` library."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType

from tokenizers import Tokenizer

from src.errors import UserError, out_of_memory
from src.files import existing_file
from src.tokenizer.base import END_OF_TEXT, require_known
from src.tokenizer.tokenizer_json import parts_of, read_tokenizer_json


class HuggingFaceTokenizer:
    """The file's own ids, without the special tokens its post-processor would add; control words in a text are text.

    End of text is `<|endoftext|>` if the file has it, else 0, RWKV's convention.
    """

    lossless = False

    def __init__(self, path: str) -> None:
        """Raises UserError if `path` is missing or not a tokenizer file."""
        checked = existing_file(path, "--tokenizer")
        with _as_user_error(f"--tokenizer {path}: not a Hugging Face tokenizer.json"):
            file = read_tokenizer_json(checked)
        self._whole, self._continuing, self._segments = file.whole, file.continuing or file.whole, file.segments
        self._decoder = file.decoder
        self.name = path
        self.vocab_size = 1 + max(self._whole.get_vocab(with_added_tokens=True).values(), default=0)
        self._named_end = self._whole.token_to_id(END_OF_TEXT)
        self.end_of_text = self._named_end or 0
        named = {word: self._whole.token_to_id(word) for word in file.control}
        self._control_tokens = set(named.values())
        self.control: Mapping[str, int] = MappingProxyType({END_OF_TEXT: self.end_of_text} | {
            word: token for word, token in named.items() if token is not None})
        self._control_words = re.compile("|".join(map(re.escape, sorted(file.control, key=len, reverse=True))))

    def encode(self, text: str, continues: bool = False) -> list[int]:
        text = text.encode("utf-8", errors="replace").decode()
        begins = self._segments.search(text) if continues and self._segments else None
        if not begins:
            return self._read(self._continuing if continues else self._whole, text)
        return self._read(self._continuing, text[:begins.start()]) + self._read(self._whole, text[begins.start():])

    def _read(self, tokenizer: Tokenizer, text: str) -> list[int]:
        tokens = self._ids(tokenizer, text)
        if self._control_tokens.isdisjoint(tokens):
            return tokens
        # The vocabulary may also have the control word as an ordinary entry; reading it in two pieces avoids that.
        cuts = [0, *(word.start() + 1 for word in self._control_words.finditer(text)), len(text)]
        if len(cuts) == 2:
            return tokens  # the control token is the one for unknown letters
        pieces = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        return [token for number, piece in enumerate(pieces)
                for token in self._ids(self._continuing if number else tokenizer, piece)]

    def _ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        with _as_user_error(f"--tokenizer {self.name}: fails on the text {text[:40]!r}"):
            return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        require_known(tokens, self.vocab_size, self.name)
        kept = [token for token in tokens if token != self._named_end]
        with _as_user_error(f"--tokenizer {self.name}: can't decode"):
            return self._whole.decode(kept, skip_special_tokens=False)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        require_known(tokens, self.vocab_size, self.name)
        return b"".join([self._pieces[token] for token in tokens])

    @cached_property
    def _pieces(self) -> list[bytes]:
        """What each token adds within a text, where no decoder strips a space from the beginning."""
        with _as_user_error(f"--tokenizer {self.name}: can't decode its tokens"):
            return self._decoded_pieces()

    def _decoded_pieces(self) -> list[bytes]:
        kinds = {part["type"] for part in parts_of(self._decoder)}
        names = [self._whole.id_to_token(token) for token in range(self.vocab_size)]
        anchor, before, after = self._anchor(names)
        pieces = []
        for token, name in enumerate(names):
            byte = re.fullmatch("<0x([0-9A-F]{2})>", name or "") if "ByteFallback" in kinds else None
            if name is None or token == self._named_end:
                pieces.append(b"")
            elif kinds == {"ByteLevel"}:
                pieces.append(_byte_level(name))
            elif byte:
                pieces.append(bytes.fromhex(byte[1]))
            else:
                text = self._whole.decode([*anchor, token, *anchor], skip_special_tokens=False)
                pieces.append(text[before:len(text) - after].encode())
        return pieces

    def _anchor(self, names: Sequence[str | None]) -> tuple[list[int], int, int]:
        """A token to put before and after another, and its number of characters in each place."""
        suffix = next((part["suffix"] for part in parts_of(self._decoder) if part["type"] == "BPEDecoder"), None)
        for token, name in enumerate(names):
            if name and name.isascii() and name.isalnum() and not (suffix and name.endswith(suffix)):
                once, twice = (self._whole.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
                if once and twice.startswith(once) and len(twice) > len(once):
                    return [token], len(once), len(twice) - len(once)
        return [], 0, 0


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Raises UserError, beginning with `what`, for any error of the library within the block.

    The library raises a bare Exception. If its Rust code panics (on a regular expression that takes too long, say), it raises
    one that is no Exception and prints a report on stderr, which is discarded here.
    """
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if out_of_memory(error) or (not isinstance(error, Exception) and type(error).__name__ != "PanicException"):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what} ({reason}); choose another tokenizer or get the file again") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# The characters of byte-level vocabularies for bytes: visible Latin-1 characters for themselves, the rest from U+0100 on.
_VISIBLE = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(byte for byte in range(0x100) if byte not in _VISIBLE)}


def _byte_level(name: str) -> bytes:
    """The bytes of a byte-level vocabulary's entry; an added token is written as itself."""
    return bytes(_BYTES[character] for character in name) if all(map(_BYTES.__contains__, name)) else name.encode()
