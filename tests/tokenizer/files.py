"""Small tokenizer.json files of the kinds that models come with, made by the `tokenizers` library."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["User: the cat sat on the mat\n\nAssistant: That is 12 cats, and a Question: who?\n\n"] * 20
ASCII = [chr(code) for code in range(0x20, 0x7f)] + ["\n"]
SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"]))
    return tokenizer


def _trained_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Entries and merges within words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=150, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=[SPACE, *ASCII[1:]]))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def llama(byte_fallback: bool = True) -> Tokenizer:
    """As Llama's and Phi's: a normalizer puts the first space, and letters that are no entry become their bytes."""
    entries, merges = _trained_merges()
    if byte_fallback:
        entries |= {name: len(entries) + number for number, name in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(entries, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace(prepend_scheme: str, inside_sequence: bool = False) -> Tokenizer:
    """As Mistral's newer files."""
    tokenizer = llama()
    tokenizer.normalizer = None
    space = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, space]) if inside_sequence else space
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLM-RoBERTa's: control words are entries as good as any."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), (SPACE, -3.0), *((letter, -4.0) for letter in ASCII[1:]),
              *((word, -5.0) for word in (f"{SPACE}the", f"{SPACE}cat", "cat", "er:", f"{SPACE}User", "Assistant", "at"))]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's: no case, no accents, no white space."""
    entries = ["[UNK]", "[CLS]", "the", "cat", "sat", "##s", "user", "assistant", *ASCII[1:],
               *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789")]
    tokenizer = Tokenizer(models.WordPiece({entry: number for number, entry in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


KINDS = {
    "ByteLevel": byte_level, "ByteLevel with a prefix": lambda: byte_level(add_prefix_space=True),
    "Prepend": llama, "Prepend without bytes": lambda: llama(byte_fallback=False),
    "Metaspace always": lambda: metaspace("always"), "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"), "Metaspace in a sequence": lambda: metaspace("first", inside_sequence=True),
    "Unigram": unigram, "WordPiece": word_piece,
}
# Those whose texts come back whatever letters they have.
LOSSLESS = ("ByteLevel", "ByteLevel with a prefix", "Prepend", "Metaspace always", "Metaspace first", "Metaspace never",
            "Metaspace in a sequence")


def saved(tokenizer: Tokenizer, folder: Path) -> str:
    path = str(folder / "tokenizer.json")
    tokenizer.save(path)
    return path
