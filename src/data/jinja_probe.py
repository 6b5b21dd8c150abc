"""What a Jinja chat template does, found by rendering probes: what is before an answer, what ends it, and what begins a turn."""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

from src.console import say
from src.data.conversation import ASSISTANT, HUMAN, ROLES, SYSTEM, Turn, untouched
from src.data.faults import BadRow
from src.data.messages import stray_character
from src.data.rendering import Fault, Job, Renderer
from src.data.templates import Ending, Piece, text_of
from src.tokenizer.base import END_OF_TEXT

# Texts that no data have: of an answer, of the two questions around it, and of a system message.
ANSWER, _QUESTION, _NEXT, _SYSTEM = ("".join(secrets.choice(ascii_lowercase) for _ in range(20)) for _ in range(4))
_STOPPED = "rendering stopped"  # kind of fault: the template went beyond a limit
_SLOW = 1.0  # seconds from which on probes are no longer rendered in silence


@dataclass(frozen=True)
class Controls:
    """The control words of a template: texts are hidden from them, and renderings are split at them."""

    words: Mapping[str, str]  # as the template writes them, and as the tokenizer knows them
    mark: str = field(default_factory=lambda: f"\ue000{secrets.token_hex(8)}:")

    def hide(self, text: str) -> str:
        return self._pattern.sub(lambda word: f"{self.mark}{list(self.words).index(word[0])}\ue001", text)

    def show(self, text: str) -> str:
        return re.sub(rf"{self.mark}([0-9]+)\ue001", lambda found: list(self.words)[int(found[1])], text)

    def pieces(self, text: str, is_answer: bool, may_train: bool) -> list[Piece]:
        parts = self._pattern.split(text)
        return [Piece(self.words[part], is_answer, may_train, is_control=True) if number % 2
                else Piece(self.show(part), is_answer, may_train) for number, part in enumerate(parts) if part]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.words, key=len, reverse=True)))})")


# Turns to render, and whether the beginning of an answer follows them.
Task = tuple[Sequence[Turn], bool]


class Renderings:
    """The renderings of turns, with control words in their texts hidden. Those rendered ahead are kept until the next are."""

    def __init__(self, renderer: Renderer, controls: Controls):
        self._renderer, self._controls = renderer, controls
        self._kept: dict[tuple[tuple[Turn, ...], bool], str] = {}

    def ahead(self, tasks: Sequence[Task]) -> None:
        """Render many at once, which takes much less time; none after one that can't be rendered."""
        keys = list(dict.fromkeys((tuple(turns), open_answer) for turns, open_answer in tasks))
        found = self._renderer.render(list(map(self._job, keys)), to_first_fault=True)
        self._kept = {key: text for key, text in zip(keys, found, strict=False) if isinstance(text, str)}

    def texts(self, tasks: Sequence[Task]) -> list[str]:
        """Raises BadRow if one can't be rendered."""
        keys = [(tuple(turns), open_answer) for turns, open_answer in tasks]
        found = [self._kept[key] for key in keys] if all(key in self._kept for key in keys) else \
            self._renderer.render(list(map(self._job, keys)), to_first_fault=True)
        for text in found:
            if isinstance(text, Fault):
                raise BadRow(_STOPPED if text.is_limit else "not rendered",
                             f"can't be rendered by --template {self._renderer.template.path}: "
                             f"{self._controls.show(text.reason)}; correct the template, or the row")
            if stray := stray_character(text):  # the template's own: no data have any
                raise BadRow("not rendered", f"gets {stray} from --template {self._renderer.template.path}; correct the "
                                             "template, in which {{ eos_token }} is the end of text")
        return [text for text in found if isinstance(text, str)]

    def _job(self, task: Task) -> Job:
        turns, open_answer = task
        return Job([{"role": ROLES[turn.speaker], "content": self._controls.hide(untouched(turn.text))} for turn in turns],
                   open_answer)


class Learned(NamedTuple):
    """What a template does with any conversation."""

    begins_with_end_of_text: bool
    answers_apart: bool
    turn_marks: tuple[str, ...]
    ending: Ending
    ends_last_answer: bool  # whether it writes what ends an answer also after the last one


def learn(renderings: Renderings, controls: Controls, name: str) -> Learned:
    """From a question with its answer, and with another question after it. Raises BadRow if they can't be rendered."""
    probes = _Probes(renderings, name)
    turns = [Turn(HUMAN, _QUESTION), Turn(ASSISTANT, ANSWER), Turn(HUMAN, _NEXT)]
    try:
        prompt, whole, longer = probes.conversation(turns)
    except BadRow as error:
        if error.kind == _STOPPED:
            raise
        turns = [Turn(SYSTEM, _SYSTEM), *turns]  # some need a system message
        prompt, whole, longer = probes.conversation(turns)
    *start, answer, question = turns
    before, after = around_answer(whole, name)
    following = longer.partition(ANSWER)[2].partition(_NEXT)[0]
    ending, ends_last = _ending(controls, after, following)
    between = before[len(prompt):] if before.startswith(prompt) else ""
    ending = ending._replace(opening=prompt[len(before):], lead=_lead(probes, controls, start, whole, between))
    asked = probes.text(start, False) or ""
    with_system = prompt if start[0].speaker == SYSTEM else probes.text([Turn(SYSTEM, _SYSTEM), *start], True) or ""
    openings = (following, _answer_opening(prompt, before, asked), _system_opening(with_system))
    marks = (*(stop for stop in ending.stops if stop.strip()), *(_mark(controls, ending, opening) for opening in openings))
    thinks = answer._replace(text=f"<think>\n{ANSWER}\n</think>\n\n{ANSWER}")
    thought, later = (probes.text([*start, thinks, *further], False) for further in ((), (question,)))
    apart = not longer.startswith(whole) or (thought is not None and later is not None and not later.startswith(thought))
    begins = [piece.is_control and piece.text == END_OF_TEXT for piece in controls.pieces(prompt, False, True)[:1]]
    return Learned(any(begins), apart, tuple(dict.fromkeys(filter(None, marks))), ending, ends_last)


def around_answer(text: str, name: str) -> tuple[str, str]:
    """What the template of this name renders before the probe for an answer, and after it. Raises BadRow."""
    before, *after = text.split(ANSWER)
    if len(after) != 1:
        raise BadRow("answer not rendered once", f"is rendered {len(after)} times by --template {name}, where it must be exactly "
                                                 "once; correct the template")
    return before, after[0]


class _Probes:
    """Renders probes, and says now and then that a slow template is at work."""

    def __init__(self, renderings: Renderings, name: str):
        self._renderings, self._name, self._said = renderings, name, time.monotonic()

    def conversation(self, turns: Sequence[Turn]) -> tuple[str, str, str]:
        """The prompt of the answer before the last turn, the turns up to it, and all of them. Raises BadRow."""
        return self._one(turns[:-2], True), self._one(turns[:-1], False), self._one(turns, False)

    def text(self, turns: Sequence[Turn], open_answer: bool) -> str | None:
        """None if they can't be rendered."""
        try:
            return self._one(turns, open_answer)
        except BadRow:
            self._tell()
            return None

    def _one(self, turns: Sequence[Turn], open_answer: bool) -> str:
        text = self._renderings.texts([(turns, open_answer)])[0]
        self._tell()
        return text

    def _tell(self) -> None:
        if time.monotonic() - self._said > _SLOW:
            say(f"note: --template {self._name} takes its time with a short conversation")
            self._said = time.monotonic()


def _ending(controls: Controls, end: str, following: str) -> tuple[Ending, bool]:
    """What ends an answer, from what follows one at the end of a conversation, and before the user's next turn; and whether it is
    in the former."""
    for text in (end, following):
        pieces = [piece for piece in controls.pieces(text, True, True) if piece.text.strip()]
        if pieces and pieces[0].is_control:
            return Ending((), (pieces[0].text,)), text == end
        if pieces:
            # White space before a control token is of the text's end; the token ends an answer too.
            return Ending((pieces[0].text.rstrip(),), tuple(piece.text for piece in pieces[1:2])), text == end
        if re.search(r"\n\s*\n", text):
            return Ending(("\n\n",), (), collapses=True), text == end
    return Ending((), (END_OF_TEXT,)), False


def _lead(probes: _Probes, controls: Controls, start: Sequence[Turn], whole: str, between: str) -> str:
    """What a model writes itself, before an answer that the template then renders with the same in front of it.

    Args:
        between: what the template renders between the prompt and an answer.
    """
    # As a model's tokens are decoded: control words by their names, except the end of text.
    lead = "".join(piece.text for piece in controls.pieces(between, True, True)
                   if not (piece.is_control and piece.text == END_OF_TEXT)).strip()
    if not lead:
        return ""
    written = f"{lead}{ANSWER}"
    again = probes.text([*start, Turn(ASSISTANT, written)], False)
    # Some take it for part of the answer, as an empty thinking part.
    return lead if again in (None, whole.replace(ANSWER, controls.hide(written))) else ""


def _answer_opening(prompt: str, before: str, asked: str) -> str:
    """What begins the assistant's turn.

    Args:
        prompt, before: as rendered for an answer to be written, and before one.
        asked: the same question with neither.
    """
    end = asked.partition(_QUESTION)[2]
    opened = [text.partition(_QUESTION)[2].removeprefix(end) for text in (min(prompt, before, key=len), before)]
    # What ends a question may be all that there is, as [/INST].
    return next((text for text in opened if text.strip()), end)


def _system_opening(text: str) -> str:
    """What begins the system's turn; some templates write the date after it, in a paragraph of its own."""
    return text.partition(_SYSTEM)[0].partition("\n\n")[0] if _SYSTEM in text else ""


def _mark(controls: Controls, ending: Ending, opening: str) -> str:
    """The part of what is rendered before a turn's text that in an answer would be read as its beginning; "" if there is none.

    What only separates turns is no part of it. A word counts at the beginning of a line. No answer has control tokens.
    """
    pieces = controls.pieces(opening, False, True)
    ends = {END_OF_TEXT, *ending.controls}
    last = max((number for number, piece in enumerate(pieces, start=1) if piece.is_control and piece.text in ends), default=0)
    if any(piece.is_control for piece in pieces[last:]):
        return ""
    text = text_of(pieces[last:])
    for stop in ending.stops:
        text = text.rpartition(stop)[2] if stop.strip() else text
    text = text.lstrip()
    return text.rstrip() if re.match(r"\W.*\w", text, re.DOTALL) else f"\n{text.rstrip(' ')}" if text else ""
