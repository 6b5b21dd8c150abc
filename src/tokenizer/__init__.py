"""Tokenizers: RWKV World, bytes, and any Hugging Face tokenizer.json, chosen by name or by the checkpoint's vocabulary."""

from src.errors import UserError
from src.tokenizer.base import Tokenizer
from src.tokenizer.byte import ByteTokenizer
from src.tokenizer.huggingface import HuggingFaceTokenizer
from src.tokenizer.world import WORLD_ROWS, WorldTokenizer

# The World vocabulary's last id is 65529; checkpoints round the number of rows up to 65536, a few older ones down.
WORLD_SIZES = range(65529, WORLD_ROWS + 1)


def load_tokenizer(name: str | None, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer called `name`, or the one of a checkpoint's vocabulary size.

    Args:
        name: "world", "bytes", the path of a Hugging Face `tokenizer.json`, or None to determine it by `vocab_size`.
        vocab_size: rows of the checkpoint's embedding, if there is a checkpoint.

    Raises:
        UserError: an unknown name, no name and an ambiguous vocabulary size, a broken tokenizer file,
            or a tokenizer with more ids than the checkpoint has rows.
    """
    if name is None:
        name = "bytes" if vocab_size == 256 else "world" if vocab_size in WORLD_SIZES else None
    if name is None:
        raise UserError(f"no tokenizer is known for a vocabulary of {vocab_size}; give --tokenizer world, bytes or FILE.json")
    tokenizer: Tokenizer
    if name == "world":
        tokenizer = WorldTokenizer(vocab_size if vocab_size is not None and vocab_size in WORLD_SIZES else WORLD_ROWS)
    elif name == "bytes":
        tokenizer = ByteTokenizer()
    elif name.endswith(".json"):
        tokenizer = HuggingFaceTokenizer(name)
    else:
        raise UserError(f"--tokenizer {name}: expected world, bytes, or the path of a tokenizer.json")
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(f"--tokenizer {name}: has {tokenizer.vocab_size} ids, the checkpoint's vocabulary only {vocab_size}; "
                        "choose the tokenizer the checkpoint was trained with")
    return tokenizer
