"""Templates: how a model's language writes turns, what ends an answer, and whether a text begins with the end-of-text token.

One `Template` says all of that for generation, preparation, SFT, samples and evaluation. This file has the interface and the
templates that are known by name; src/data/jinja_template.py makes one of a file.

`classic` is the mixture of RWKV-LM-RLHF: a question with its answer gets one of three pairs of names, drawn 80/10/10. A blank
line ends each of its turns, so its texts must not contain one. The templates of the RWKV-7 G1 models (model cards of
BlinkDL/rwkv7-g1) begin with token 0. There an answer ends with token 0, or where the user's next turn begins, so blank lines
inside an answer stay.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

import numpy as np

from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn, clean, prompt_turns, untouched
from src.data.faults import BadRow
from src.tokenizer.base import END_OF_TEXT

# Bytes of all texts that end an answer: each takes a row of generation's automaton, which has a column for each token.
LONGEST_STOPS = 1000


class Piece(NamedTuple):
    """A stretch of a conversation's text, or a control word that becomes one token."""

    text: str
    is_answer: bool
    may_train: bool = True  # False for an answer that has no loss according to the data
    is_control: bool = False


class Ending(NamedTuple):
    """What ends an answer, and how the answer's text is read from what a model has written."""

    stops: tuple[str, ...]  # texts that end it and are not part of it
    controls: tuple[str, ...]  # control words that end it
    opening: str = ""  # the beginning of the answer's text that is already in the prompt
    collapses: bool = False  # whether an answer keeps no blank lines inside, since one ends a turn
    lead: str = ""  # what a model writes before the answer's text, and the template then renders there again

    def answer(self, written: str) -> str:
        """The text of an answer from what was written after its prompt, up to what ends it."""
        return self.kept(self.begun(written))

    def begun(self, written: str) -> str:
        """What was written after a prompt, with the beginning of the answer's text."""
        return self.opening + (written.lstrip().removeprefix(self.lead) if self.lead else written)

    def kept(self, text: str) -> str:
        """An answer's text as this template keeps it."""
        return clean(text) if self.collapses else untouched(text)


class Template(Protocol):
    """How turns become text."""

    @property
    def name(self) -> str:
        """As --template names it."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that it does, in hexadecimal."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Names of its forms; where there are several, one is drawn for each row."""

    @property
    def begins_with_end_of_text(self) -> bool:
        """Whether a text begins with the token that ends one."""

    @property
    def can_refuse(self) -> bool:
        """Whether there are turns that it can't render."""

    @property
    def fault(self) -> BadRow | None:
        """Why it can render no row, not even a plain question with its answer."""

    @property
    def answers_apart(self) -> bool:
        """Whether prompts show earlier answers otherwise than as they were written, so that each is trained in its own text."""

    @property
    def turn_marks(self) -> tuple[str, ...]:
        """Texts that begin or end a turn; an answer that has one inside can be mistaken for several turns."""

    @property
    def ending(self) -> Ending:
        """What ends an answer."""

    def prompt(self, turns: Sequence[Turn], form: int = 0) -> list[Piece]:
        """Turns that end in the human's, up to where the answer begins. Raises BadRow, without the row's name."""

    def conversation(self, turns: Sequence[Turn], first: int, form: int = 0) -> list[Piece]:
        """Whole turns that end in the assistant's: what comes before an answer, the answer with what ends it, and so on.

        Answers are the assistant's turns from number `first` on; earlier ones count as part of the prompt. The pieces before the
        first answer are those of `prompt`. Raises BadRow, without the row's name.
        """

    def render_ahead(self, conversations: Iterable[tuple[Sequence[Turn], int]]) -> None:
        """Prepare for these arguments of `conversation`, asked for next: rendering many at once may take less time."""


@dataclass(frozen=True)
class NamedTurns:
    """A template whose turns are `Name: text`, with a blank line between them."""

    name: str
    forms: tuple[str, ...]
    names: tuple[tuple[str, str], ...]  # for each form, of the user and of the assistant
    ending: Ending
    begins_with_end_of_text: bool = False
    opening: str = ""  # follows the assistant's name in a prompt
    lead: str = " "  # stands between that and the rest of the answer
    request: str = ""  # follows the user's text in a prompt

    @property
    def fingerprint(self) -> str:
        asked = [Turn(SYSTEM, "s\n\ns"), Turn(HUMAN, "u\n\nu"), Turn(ASSISTANT, "<think>a\n\na"), Turn(HUMAN, "u")]
        answered = [*asked, Turn(ASSISTANT, "<think>a\n\na")]
        probes = [self.prompt(turns, form) for form in range(len(self.forms)) for turns in (asked, asked[1:2])]
        if not self.opening or self.ending.opening:
            probes += [self.conversation(answered, first) for first in (0, 4)]
        return hashlib.sha256(json.dumps([probes, self.ending[:4]]).encode()).hexdigest()

    @property
    def can_refuse(self) -> bool:
        return bool(self.opening)

    @property
    def fault(self) -> None:
        return None

    @property
    def answers_apart(self) -> bool:
        return bool(self.request or (self.opening and not self.ending.opening))

    @property
    def turn_marks(self) -> tuple[str, ...]:
        apart = "\n" if self.ending.collapses else "\n\n"
        return tuple(f"{apart}{name}:" for name in dict.fromkeys(("System", *(name for pair in self.names for name in pair))))

    def prompt(self, turns: Sequence[Turn], form: int = 0) -> list[Piece]:
        asker, answerer = self.names[form if len(turns) == 1 else 0]
        text = "".join(self._before_answer(turn, number == len(turns) - 1, asker, answerer) for number, turn in enumerate(turns))
        return [*self._beginning(), Piece(f"{text}{answerer}:{self.opening}", False)]

    def conversation(self, turns: Sequence[Turn], first: int, form: int = 0) -> list[Piece]:
        asker, answerer = self.names[form if [turn.speaker for turn in turns] == [HUMAN, ASSISTANT] else 0]
        pieces, before, named = self._beginning(), "", False
        for number, turn in enumerate(turns):
            if turn.speaker != ASSISTANT or number < first:
                asks = number + 1 < len(turns) and turns[number + 1].speaker == ASSISTANT and number + 1 >= first
                text = self._before_answer(turn, asks, asker, answerer)
                before += text.removeprefix(f"{asker}:") if named else text
                named = False
                continue
            pieces.append(Piece(f"{before}{answerer}:{self.opening}", False))
            before, is_last = "", number == len(turns) - 1
            # The name of the turn that follows is part of the answer: with it the model says that the answer has ended.
            named = not is_last and not self.ending.collapses
            end = "\n\n" if self.ending.collapses else f"\n\n{asker}:" if named else ""
            pieces.append(Piece(self.lead + self._rest(turn.text) + end, turn.trained, turn.trained))
            if is_last:
                pieces += [Piece(word, turn.trained, turn.trained, is_control=True) for word in self.ending.controls]
        return pieces

    def render_ahead(self, conversations: Iterable[tuple[Sequence[Turn], int]]) -> None:
        pass  # each takes microseconds

    def _beginning(self) -> list[Piece]:
        return [Piece(END_OF_TEXT, False, is_control=True)] if self.begins_with_end_of_text else []

    def _before_answer(self, turn: Turn, asks: bool, asker: str, answerer: str) -> str:
        """A turn of a prompt; the one that `asks` for the answer may carry a request."""
        if turn.speaker == ASSISTANT:
            return f"{answerer}: {self.ending.kept(turn.text)}\n\n"
        name = "System" if turn.speaker == SYSTEM else asker
        return f"{name}: {clean(turn.text)}{self.request if asks else ''}\n\n"

    def _rest(self, answer: str) -> str:
        """An answer's text after the prompt's opening."""
        text = self.ending.kept(answer)
        if not text.startswith(self.ending.opening):
            raise BadRow("answer without thinking", f"does not begin with {self.ending.opening}, as --template {self.name} opens "
                                                    "it; take --template g1, or g1-fakethink for answers without thinking")
        if self.opening and not self.ending.opening and text.startswith("<think"):
            raise BadRow("answer with thinking", f"begins with <think>, but --template {self.name} closes the thinking before "
                                                 "the answer; take --template g1 or g1-think")
        return text.removeprefix(self.ending.opening)


_G1 = (("User", "Assistant"),)
_G1_STOPS = ("\n\nUser:",)
CLASSIC = NamedTurns(
    "classic", ("user", "question", "input"), (("User", "Assistant"), ("Question", "Answer"), ("Input", "Response")),
    Ending(("\n\n",), (), collapses=True))


def _g1(name: str, opening: str = "", lead: str = " ", answer_opening: str = "", request: str = "") -> NamedTurns:
    return NamedTurns(name, (name,), _G1, Ending(_G1_STOPS, (END_OF_TEXT,), answer_opening), True, opening, lead, request)


# Models from September 2025 on take a request for more or less thinking after the user's text.
TEMPLATES: dict[str, Template] = {template.name: template for template in (
    CLASSIC, _g1("g1"), _g1("g1-fakethink", " <think>\n</think>", "\n"), _g1("g1-think", " <think", "", "<think"),
    *(_g1(f"g1-think:{request.replace(' ', '-')}", " <think", "", "<think", f" {request}")
      for request in ("think", "think a bit", "think a lot")))}


def draw_form(template: Template, generator: np.random.Generator | Random) -> int:
    """Draw a form's index: of three, 0 with 80 %, 1 with 10 %, 2 with 10 %, by one uniform number of the generator."""
    if len(template.forms) == 1:
        return 0
    number = generator.random()
    return 0 if number < 0.8 else 1 if number < 0.9 else 2


def text_of(pieces: Sequence[Piece], with_control: bool = False) -> str:
    """The joined text, without or with the control words."""
    return "".join(piece.text for piece in pieces if with_control or not piece.is_control)


def split_pieces(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """The pieces before the first answer, and the rest."""
    at = next(at for at, piece in enumerate(pieces) if piece.is_answer)
    return list(pieces[:at]), list(pieces[at:])


def prompt_pieces(template: Template, prompt: str, form: int = 0) -> list[Piece]:
    """A prompt's text, a question or a transcript, up to where the answer begins."""
    return template.prompt(prompt_turns(prompt), form)


def answer_pieces(template: Template, prompt: str, answer: str) -> list[Piece]:
    """An answer's pieces, with what ends it; they are the same in all forms."""
    turns = prompt_turns(prompt)
    return split_pieces(template.conversation([*turns, Turn(ASSISTANT, answer)], len(turns)))[1]
