"""Tokenizers: RWKV World, bytes, and any Hugging Face tokenizer.json, chosen by name or by the checkpoint's vocabulary."""

from src.errors import UserError
from src.tokenizer.base import Tokenizer
from src.tokenizer.byte import ByteTokenizer
from src.tokenizer.huggingface import HuggingFaceTokenizer
from src.tokenizer.world import WorldTokenizer

# The World vocabulary's last id is 65529; checkpoints round the number of rows up to 65536, and a few older ones round it down.
WORLD_SIZES = range(65529, 65537)


def load_tokenizer(name: str | None, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer called `name`, or the one that belongs to a checkpoint's vocabulary size.

    Args:
        name: "world", "bytes", the path of a Hugging Face `tokenizer.json`, or None to go by `vocab_size`.
        vocab_size: rows of the checkpoint's embedding, where a checkpoint is at hand.

    Raises:
        UserError: an unknown name, no name and a vocabulary that tells nothing, a broken tokenizer file,
            or a tokenizer with more ids than the checkpoint has rows.
    """
    if name is None:
        name = "bytes" if vocab_size == 256 else "world" if vocab_size in WORLD_SIZES else None
    if name is None:
        raise UserError(f"a vocabulary of {vocab_size} tells no tokenizer; pass --tokenizer world, bytes, or a tokenizer.json")
    tokenizer: Tokenizer
    if name == "world":
        tokenizer = WorldTokenizer()
        fits = vocab_size is None or vocab_size >= WORLD_SIZES.start
    elif name == "bytes":
        tokenizer = ByteTokenizer()
        fits = vocab_size is None or vocab_size >= tokenizer.vocab_size
    elif name.endswith(".json"):
        tokenizer = HuggingFaceTokenizer(name)
        fits = vocab_size is None or vocab_size >= tokenizer.vocab_size
    else:
        raise UserError(f"--tokenizer {name}: expected world, bytes, or the path of a tokenizer.json")
    if not fits:
        raise UserError(f"--tokenizer {name}: has {tokenizer.vocab_size} ids, the checkpoint's vocabulary only {vocab_size}; "
                        "choose the tokenizer the checkpoint was trained with")
    return tokenizer
