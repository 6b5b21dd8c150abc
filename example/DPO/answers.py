"""From a docstring to a question and its short answer, and whether two answers say the same."""

import hashlib
import re
from functools import cache
from pathlib import Path

from example.DPO.docstrings import Entry

SHORTEST, LONGEST = 30, 200  # bytes of an answer

_CALL = r"[\w.]+\([^()]*(?:\([^()]*\)[^()]*)*\)"
# "S.find(sub[, start]) -> int", alone on its line or followed by the text on the same line.
_SIGNATURE = re.compile(rf"{_CALL}(?:\s*(?:-{{1,2}}>|=>|=)\s*[^.:\n]*?)?(?:[.:]\s+|\s+--?-?\s+|\.?\s*(?:\n|$))")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|incl|Dr|Mr|al|No|[A-Za-z]\.[A-Za-z]|[A-Z])|\.\.)\.$")
_REST_ROLE = re.compile(r":(?:\w+:)?\w+:`~?([^`]*)`")
# Code, tables, markup, letters that stand for an argument, and anything outside printable ASCII.
_MARKS = re.compile(
    r">>>|->|<-|::|\.\.\.|\*\*|https?:|\bwww\.|[{}\\|<>#~^_]{2}|<\w+>|[^\x20-\x7e]|[:;,=]\s?\.$"
    r"|(?<!/)\b[B-HJ-Z]\b(?![(/])|\b[a-z]\.\w+\(|\[,|\bXXX|\bTODO|\bFIXME"
)
# What leans on text that is not there, is not for users, or says nothing of the thing itself.
_PHRASES = re.compile(
    r"\bsee (?:also|help|the|`|\w+\.|\w+\(|pep|above|below)|\bsee:|\bhelp\(|\bpep[ -]?\d|\brfc ?\d|\brelease notes"
    r"|\breference manual|\b(?:above|below|following|previous|aforementioned)\b|\bexample|\busage\b|\bdocstring"
    r"|\bthis (?:is|method|function|class|module|exception|routine|property|attribute)\b"
    r"|\bsame as\b|\balias (?:for|of)|\bequivalent to\b|\blike \w+\("
    r"|\bdeprecat|\bobsolete|\blegacy|\bundocumented|\bdo not use|\bnot use this|\bbackwards?[- ]compat|\bpython [12]\b"
    r"|\bversion \d|\bnew in|\bchanged in|\bwindows only|\bunix only"
    r"|\binternal|\bprivate\b|\bhelper|\bwrapper (?:around|for)|\bthin wrapper|\bimplementation of|\bimplements? "
    r"|\bsubclass(?:es)? (?:should|must|may|can)|\boverrid|\babstract|\bmix-?in\b|\bcvs\b|\bcopyright|\bauthor",
    re.IGNORECASE,
)
_FIRST_WORD = re.compile(r"(?:[A-Z][a-z]+|A|I|An|UTF|SSL|TCP|UDP|HTTP|JSON|XML|CSV|HTML|MIME|URL)\b")
_LEAD = re.compile(r"(?:Use|Python raises) `[\w.]+`\. ")
NAMES_FILE = Path(__file__).parent / "names.txt"

# The letters by which the docstrings of a type call the object itself.
_OBJECT = {
    "str": ("S", "the string"),
    "bytes": ("B", "the bytes"),
    "bytearray": ("B", "the bytearray"),
    "dict": ("D", "the dictionary"),
}


def asked_names() -> dict[str, str]:
    """The names that the example asks about, each with its question in someone's own words, or an empty string."""
    lines = (line.strip() for line in NAMES_FILE.read_text(encoding="utf-8").splitlines())
    return {name: asked for name, _, asked in (line.partition(": ") for line in lines if line and not line.startswith("#"))}


def lead(entry: Entry) -> str:
    """The sentence that names the tool or the exception, before its description."""
    return f"Python raises `{entry.name}`." if entry.kind == "exception" else f"Use `{entry.name}`."


def without_lead(answer: str) -> str:
    """An answer as the documentation has it."""
    return _LEAD.sub("", answer, count=1)


def short_answer(entry: Entry, opening: str = "") -> str | None:
    """The first one or two sentences of a docstring as plain prose, or None where they don't make a good answer.

    With an `opening`, such as `lead(entry)`, the answer is that sentence and the docstring's first.
    """
    sentences = _sentences(_beginning(entry.text))
    if entry.module in _OBJECT:
        letter, noun = _OBJECT[entry.module]
        sentences = [re.sub(rf"\b{letter}\b(?!\[)", noun, sentence) for sentence in sentences]
    for chosen in (sentences[:1],) if opening else (sentences[:2], sentences[:1]):
        answer = " ".join([opening, *chosen]).strip()
        if chosen and all(map(_reads_well, chosen)) and SHORTEST <= len(answer.encode()) <= LONGEST and answer.count(" ") >= 3:
            return answer
    return None


def _beginning(text: str) -> str:
    """The first paragraph on one line, and the second where the first is very short, without signatures and markup."""
    text = text.strip()
    while match := _SIGNATURE.match(text):
        text = text[match.end() :].lstrip()
    paragraphs = [_plain(paragraph) for paragraph in re.split(r"\n\s*\n", text, maxsplit=2)[:2]]
    # Only a whole first paragraph may have lost its full stop.
    paragraphs[0] += "." if re.search(r"[\w)`'\"\]]$", paragraphs[0]) else ""
    if len(paragraphs[0]) < 2 * SHORTEST and re.match(r"[A-Z].*\.$", paragraphs[0]):
        return " ".join(paragraphs)
    return paragraphs[0]


def _plain(paragraph: str) -> str:
    # Line breaks followed by an indent are a list or a table, not prose: what leads up to it is no whole sentence.
    prose, *listed = re.split(r"\n(?=[ \t*-])", paragraph)
    prose += " ..." if listed else ""
    prose = _REST_ROLE.sub(r"`\1`", " ".join(prose.split())).replace("``", "`")
    prose = re.sub(r"(?<![\w*])\*(\w+)\*(?![\w*])", r"`\1`", prose)
    prose = re.sub(r"`([\w.]+)'", r"`\1`", prose)
    if re.match(r"(?:the|an?|new|returns?|true if|number of|sum of|create|make) ", prose):
        prose = prose[0].upper() + prose[1:]
    return prose


def _sentences(paragraph: str) -> list[str]:
    sentences, start = [], 0
    for stop in re.finditer(r"[.!?][)\"']?(?=\s|$)", paragraph):
        candidate = paragraph[start : stop.end()].strip()
        if not _ABBREVIATION.search(candidate) or stop.end() == len(paragraph):
            sentences.append(candidate)
            start = stop.end()
    return sentences


def _reads_well(sentence: str) -> bool:
    balanced = all(sentence.count(left) == sentence.count(right) for left, right in ("()", "[]"))
    paired = all(sentence.count(mark) % 2 == 0 for mark in '`"')
    unwanted = _MARKS.search(sentence) or _PHRASES.search(sentence)
    return bool(sentence.endswith(".") and balanced and paired and _FIRST_WORD.match(sentence) and not unwanted)


_FORMS = {
    "module": (
        "What is the `{name}` module for?",
        "What does Python's `{name}` module provide?",
        "In one sentence, what is the {name} module?",
        "What does `import {name}` give me?",
    ),
    "class": (
        "What is `{name}` in Python?",
        "In Python, what is `{name}` for?",
        "What does `{name}` give me?",
        "Can you explain `{name}` briefly?",
    ),
    "exception": (
        "What does `{name}` mean?",
        "My program stopped with {name}. What does that tell me?",
        "What kind of error is `{name}`?",
        "Python raised `{name}`. Why would it?",
    ),
    "function": (
        "What does `{name}` do?",
        "What does `{name}()` do in Python?",
        "In Python, what is `{name}` for?",
        "Can you explain what {name}() does?",
        "I came across `{name}` in some code. What does it do?",
        "What is the purpose of `{name}`?",
    ),
    "method": (
        "What does `{name}` do?",
        "What does the method `{name}` do?",
        "In Python, what does `{name}()` do?",
        "Can you explain what {name}() does?",
        "I saw a call of `{name}`. What does it do?",
        "What happens when I call `{name}`?",
    ),
    "property": (
        "What is `{name}`?",
        "What does the attribute `{name}` hold?",
        "What can I read from `{name}`?",
    ),
}


def question(entry: Entry, turn: int = 0) -> str:
    """A natural question about `entry`, its form drawn by a hash of the name; `turn` walks on to other forms."""
    forms = _FORMS[entry.kind]
    draw = int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[:4], "big")
    return forms[(draw + turn) % len(forms)].format(name=entry.name)


@cache
def words(answer: str) -> frozenset[str]:
    """The set of an answer's words, by which answers are compared."""
    return frozenset(re.findall(r"[a-z0-9]+", answer.lower()))


def nearly_same(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets of words overlap so far that one answer gives the other away."""
    return len(one & other) >= 0.6 * len(one | other)
