"""The byte tokenizer: a token is the value of a UTF-8 byte, and 0 ends the text."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from src.tokenizer.base import END_OF_TEXT, require_known


class ByteTokenizer:
    """256 ids. A NUL character in the text is the end-of-text token, which decodes to nothing."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0
    control: Mapping[str, int] = MappingProxyType({END_OF_TEXT: 0})
    lossless = True

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        require_known(tokens, self.vocab_size, self.name)
        return bytes(token for token in tokens if token != self.end_of_text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")
