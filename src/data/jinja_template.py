"""A `Template` made of a Jinja chat template: where an answer begins and ends is found by rendering.

Texts go into the rendering unchanged, except that control words in them are hidden from what splits the result at the template's
own control words. A template must reproduce every answer exactly once and unchanged, after exactly what it renders as the prompt.
"""

import re
import secrets
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from string import ascii_lowercase

from src.console import say
from src.data.chat_template import read_chat_template
from src.data.conversation import ASSISTANT, HUMAN, ROLES, SYSTEM, Turn, answer_places, untouched
from src.data.faults import BadRow
from src.data.rendering import ChatTemplate, Fault, Job, Renderer
from src.data.templates import LONGEST_STOPS, Ending, Piece
from src.errors import UserError
from src.tokenizer import Tokenizer
from src.tokenizer.base import END_OF_TEXT, END_OF_TEXT_IN_RWKV

# Texts that no data have: of an answer, and of the two questions around it.
_ANSWER, _QUESTION, _NEXT = ("".join(secrets.choice(ascii_lowercase) for _ in range(20)) for _ in range(3))


@dataclass(frozen=True)
class _Controls:
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
_Task = tuple[Sequence[Turn], bool]


class _Renderings:
    """The renderings of turns, with control words in their texts hidden. Those rendered ahead are kept until the next are."""

    def __init__(self, renderer: Renderer, controls: _Controls):
        self._renderer, self._controls = renderer, controls
        self._kept: dict[tuple[tuple[Turn, ...], bool], str] = {}

    def ahead(self, tasks: Sequence[_Task]) -> None:
        """Render many at once, which takes much less time; none after one that can't be rendered."""
        keys = list(dict.fromkeys((tuple(turns), open_answer) for turns, open_answer in tasks))
        found = self._renderer.render(list(map(self._job, keys)), to_first_fault=True)
        self._kept = {key: text for key, text in zip(keys, found, strict=False) if isinstance(text, str)}

    def texts(self, tasks: Sequence[_Task]) -> list[str]:
        """Raises BadRow if one can't be rendered."""
        keys = [(tuple(turns), open_answer) for turns, open_answer in tasks]
        found = [self._kept[key] for key in keys] if all(key in self._kept for key in keys) else \
            self._renderer.render(list(map(self._job, keys)), to_first_fault=True)
        for text in found:
            if isinstance(text, Fault):
                raise BadRow("not rendered", f"can't be rendered by --template {self._renderer.template.path}: {text.reason}")
        return [text for text in found if isinstance(text, str)]

    def _job(self, task: _Task) -> Job:
        turns, open_answer = task
        return Job([{"role": ROLES[turn.speaker], "content": self._controls.hide(untouched(turn.text))} for turn in turns],
                   open_answer)


@dataclass(frozen=True)
class JinjaTemplate:
    """See `Template`. Made by `jinja_template`."""

    name: str
    fingerprint: str
    begins_with_end_of_text: bool
    answers_apart: bool
    turn_openings: tuple[str, ...]
    ending: Ending
    controls: _Controls
    renderings: _Renderings
    fault: BadRow | None = None
    can_refuse: bool = True

    @property
    def forms(self) -> tuple[str, ...]:
        return (self.name,)

    def prompt(self, turns: Sequence[Turn], form: int = 0) -> list[Piece]:
        return self.controls.pieces(self.renderings.texts([(self._kept(turns), True)])[0], False, True)

    def conversation(self, turns: Sequence[Turn], first: int, form: int = 0) -> list[Piece]:
        if self.fault:
            raise self.fault
        turns = self._kept(turns)
        places = answer_places(turns, first)
        texts = self.renderings.texts(_tasks(turns, places))
        pieces: list[Piece] = []
        done, whole = 0, texts[-2]
        for at, prompt, text, probe in zip(places, texts[::3], texts[1::3], texts[2::3], strict=True):
            self._check(turns[at].text, prompt, text, probe, whole)
            trained = turns[at].trained
            pieces += self.controls.pieces(prompt[done:], False, True)
            pieces += self.controls.pieces(text[len(prompt):], trained, trained)
            done = len(text)
        return pieces

    def render_ahead(self, conversations: Iterable[tuple[Sequence[Turn], int]]) -> None:
        if self.fault is None:
            self.renderings.ahead([task for turns, first in conversations
                                   for task in _tasks(self._kept(turns), answer_places(turns, first))])

    def _kept(self, turns: Sequence[Turn]) -> list[Turn]:
        return [turn._replace(text=self.ending.kept(turn.text)) if turn.speaker == ASSISTANT else turn for turn in turns]

    def _check(self, answer: str, prompt: str, text: str, probe: str, whole: str) -> None:
        before, after = _around_answer(probe, self.name)
        answer = self.controls.hide(untouched(answer))
        # What a template opens an answer with, as an empty thinking part, it may leave to an answer that has its own.
        itself = prompt.startswith(text[:-len(answer + after)]) and text.endswith(answer + after)
        if text != f"{before}{answer}{after}" and not itself:
            raise BadRow("answer changed", f"is changed by --template {self.name}: {_changed(before, prompt, text, after)}; "
                                           "correct the template, or the answer")
        if not text.startswith(prompt):
            raise BadRow("answer does not follow", f"does not follow the prompt as --template {self.name} renders it, which ends "
                                                   f"in {prompt[-40:]!r}; correct the template, or the answer")
        if not whole.startswith(text):
            raise BadRow("turns change", f"has an answer that --template {self.name} renders otherwise once further turns "
                                         "follow; train only on last answers, or correct the template")


def jinja_template(path: str, tokenizer: Tokenizer) -> JinjaTemplate:
    """The template of a file. One that can't render a question and its answer has a fault, which the first row then reports.

    A note on stderr says where RWKV's name for the end of text becomes plain text, since the tokenizer has no such token.

    Raises UserError for a file that is no chat template, or that names tokens which the tokenizer lacks.
    """
    template = read_chat_template(path)
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | dict(template.special_tokens)
    template = ChatTemplate(template.path, template.source, named)
    controls, renderer = _Controls(_control_words(template, tokenizer)), Renderer(template)
    renderings = _Renderings(renderer, controls)
    fault = None
    try:
        begins, apart, openings, ending = _learned(renderings, controls, path)
    except BadRow as error:
        fault, begins, apart, openings, ending = error, False, False, (), Ending((), (END_OF_TEXT,))
    if (length := sum(len(stop.encode()) for stop in ending.stops)) > LONGEST_STOPS:
        raise UserError(f"--template {path}: the text that it ends an answer with has {length} bytes, of at most "
                        f"{LONGEST_STOPS}; correct the template")
    if END_OF_TEXT_IN_RWKV in template.source and END_OF_TEXT_IN_RWKV not in controls.words:
        say(f"note: --template {path}: {END_OF_TEXT_IN_RWKV} is plain text with --tokenizer {tokenizer.name}, which has no such "
            "token; write {{ eos_token }} in its place for the end of text")
    made = JinjaTemplate(path, template.fingerprint, begins, apart, openings, ending, controls, renderings, fault)
    weakref.finalize(made, renderer.close)
    return made


def _learned(renderings: _Renderings, controls: _Controls, name: str) -> tuple[bool, bool, tuple[str, ...], Ending]:
    """Whether texts begin with the end of text, whether answers are rendered otherwise once turns follow, what comes before the
    text of a turn, and what ends an answer, from a question with its answer, and with another question after it. Raises BadRow if
    they can't be rendered."""
    turns = [Turn(HUMAN, _QUESTION), Turn(ASSISTANT, _ANSWER), Turn(HUMAN, _NEXT)]
    try:
        prompt, whole, longer = renderings.texts([(turns[:1], True), (turns[:2], False), (turns, False)])
    except BadRow:  # some need a system message
        turns = [Turn(SYSTEM, "You answer questions."), *turns]
        prompt, whole, longer = renderings.texts([(turns[:2], True), (turns[:3], False), (turns, False)])
    before, after = _around_answer(whole, name)
    following = longer.partition(_ANSWER)[2].partition(_NEXT)[0]
    opening = following.rstrip()
    openings = (opening,) if opening and not any(piece.is_control for piece in controls.pieces(opening, False, True)) else ()
    first = controls.pieces(prompt, False, True)[0]
    apart = not longer.startswith(whole) or _changes_thinking(renderings, turns)
    return (first.is_control and first.text == END_OF_TEXT, apart, openings,
            _ending(controls, after, following, prompt[len(before):]))


def _around_answer(text: str, name: str) -> tuple[str, str]:
    """What the template of this name renders before the probe for an answer, and after it. Raises BadRow."""
    before, *after = text.split(_ANSWER)
    if len(after) != 1:
        raise BadRow("answer not rendered once", f"is rendered {len(after)} times by --template {name}, where it must be exactly "
                                                 "once; correct the template")
    return before, after[0]


def _changes_thinking(renderings: _Renderings, turns: Sequence[Turn]) -> bool:
    """Whether an answer with a thinking part, before the last of the turns, is rendered otherwise because of that one."""
    *start, answer, question = turns
    thinks = answer._replace(text=f"<think>\n{_ANSWER}\n</think>\n\n{_ANSWER}")
    try:
        whole, longer = renderings.texts([([*start, thinks], False), ([*start, thinks, question], False)])
    except BadRow:
        return False
    return not longer.startswith(whole)


def _ending(controls: _Controls, end: str, following: str, opening: str) -> Ending:
    """What ends an answer, from what follows one at the end of a conversation, and before the user's next turn."""
    for text in (end, following):
        pieces = [piece for piece in controls.pieces(text, True, True) if piece.text.strip()]
        if pieces and pieces[0].is_control:
            return Ending((), (pieces[0].text,), opening)
        if pieces:
            # White space before a control token is of the text's end; the token ends an answer too.
            return Ending((pieces[0].text.rstrip(),), tuple(piece.text for piece in pieces[1:2]), opening)
        if re.search(r"\n\s*\n", text):
            return Ending(("\n\n",), (), opening, collapses=True)
    return Ending((), (END_OF_TEXT,), opening)


def _control_words(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, str]:
    words = {word: END_OF_TEXT if token == tokenizer.end_of_text else word for word, token in tokenizer.control.items()}
    for name in ("bos_token", "eos_token"):
        word = template.special_tokens[name]
        if word.strip() and word not in words:  # a model may end a text at a blank line
            # World and bytes have one control token; other tokenizers have names for theirs.
            if not tokenizer.lossless:
                raise UserError(f"--template {template.path}: its {name} is {word!r}, which --tokenizer {tokenizer.name} does "
                                "not have; give the tokenizer.json of the same model")
            words[word] = END_OF_TEXT
    return words


def _tasks(turns: Sequence[Turn], answers: Sequence[int]) -> list[_Task]:
    """For each answer the prompt before it, the turns up to it, and the same with a probe in its place."""
    return [task for at in answers for task in (
        (turns[:at], True), (turns[:at + 1], False), ([*turns[:at], Turn(ASSISTANT, _ANSWER)], False))]


def _changed(before: str, prompt: str, text: str, after: str) -> str:
    made = text.removeprefix(before if text.startswith(before) else prompt).removesuffix(after)
    return f"it becomes {made[:40]!r}" + "..." * (len(made) > 40)
