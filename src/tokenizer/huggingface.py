"""Any Hugging Face `tokenizer.json`, through the `tokenizers` library."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from src.errors import UserError
from src.files import existing_file
from src.tokenizer.base import require_known


class HuggingFaceTokenizer:
    """The file's own ids, without the special tokens its post-processor would add.

    End of text is `<|endoftext|>` where the file names it and 0, RWKV's convention, where it does not.
    The library gives text rather than bytes, so a token that ends within a character decodes to U+FFFD.
    """

    def __init__(self, path: str) -> None:
        """Raises UserError where `path` is missing or not a tokenizer file."""
        existing_file(path, "--tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise UserError(f"--tokenizer {path}: not a Hugging Face tokenizer.json ({str(error).splitlines()[0]})") from error
        self.name = path
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self._named_end = self._tokenizer.token_to_id("<|endoftext|>")
        self.end_of_text = self._named_end or 0

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.encode("utf-8", errors="replace").decode(), add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        require_known(tokens, self.vocab_size, self.name)
        kept = [token for token in tokens if token != self._named_end]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return self.decode(tokens).encode("utf-8")
