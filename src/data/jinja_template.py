"""A `Template` made of a Jinja chat template: where an answer begins and ends is found by rendering.

Texts go into the rendering unchanged, except that control words in them are hidden from what splits the result at the template's
own control words. A template must reproduce every answer exactly once and unchanged, after exactly what it renders as the prompt.
"""

import re
import secrets
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.data.chat_template import read_chat_template
from src.data.conversation import ASSISTANT, HUMAN, ROLES, Turn, untouched
from src.data.faults import BadRow
from src.data.rendering import ChatTemplate, Fault, Job, Renderer
from src.data.templates import Ending, Piece
from src.errors import UserError
from src.tokenizer import Tokenizer
from src.tokenizer.base import END_OF_TEXT

_PROBES = tuple(f"probe{secrets.token_hex(8)}" for _ in range(3))


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

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.words, key=len, reverse=True)))})")


@dataclass(frozen=True)
class JinjaTemplate:
    """See `Template`. Made by `jinja_template`."""

    name: str
    fingerprint: str
    begins_with_end_of_text: bool
    turn_openings: tuple[str, ...]
    ending: Ending
    controls: _Controls
    renderer: Renderer
    can_refuse: bool = True

    @property
    def forms(self) -> tuple[str, ...]:
        return (self.name,)

    def prompt(self, turns: Sequence[Turn], form: int = 0) -> list[Piece]:
        return self.controls.pieces(_render(self.renderer, self.controls, [(turns, True)])[0], False, True)

    def conversation(self, turns: Sequence[Turn], first: int, form: int = 0) -> list[Piece]:
        places = [at for at, turn in enumerate(turns) if turn.speaker == ASSISTANT and at >= first]
        # For each answer the prompt before it, the turns up to it, and the same with a probe in its place.
        jobs = [job for at in places for job in (
            (turns[:at], True), (turns[:at + 1], False), ([*turns[:at], Turn(ASSISTANT, _PROBES[0])], False))]
        texts = _render(self.renderer, self.controls, jobs)
        pieces: list[Piece] = []
        done, whole = 0, texts[-2]
        for at, prompt, text, probe in zip(places, texts[::3], texts[1::3], texts[2::3], strict=True):
            self._check(turns[at].text, prompt, text, probe, whole)
            trained = turns[at].trained
            pieces += self.controls.pieces(prompt[done:], False, True)
            pieces += self.controls.pieces(text[len(prompt):], trained, trained)
            done = len(text)
        return pieces

    def _check(self, answer: str, prompt: str, text: str, probe: str, whole: str) -> None:
        before, *after = probe.split(_PROBES[0])
        if len(after) != 1:
            raise BadRow("answer not rendered once", f"is rendered {len(after)} times by --template {self.name}, where it must "
                                                     "be exactly once; correct the template")
        if text != f"{before}{self.controls.hide(untouched(answer))}{after[0]}":
            raise BadRow("answer changed", f"is changed by --template {self.name}: {_changed(before, text, after[0])}; correct "
                                           "the template, or the answer")
        if not text.startswith(prompt):
            raise BadRow("answer does not follow", f"does not follow the prompt as --template {self.name} renders it, which ends "
                                                   f"in {prompt[-40:]!r}; correct the template, or the answer")
        if not whole.startswith(text):
            raise BadRow("turns change", f"is rendered otherwise by --template {self.name} once further turns follow; train only "
                                         "on last answers, or correct the template")


def jinja_template(path: str, tokenizer: Tokenizer) -> JinjaTemplate:
    """Raises UserError for a file that is no chat template, renders no conversation, or names tokens that the tokenizer lacks."""
    template = read_chat_template(path)
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | dict(template.special_tokens)
    template = ChatTemplate(template.path, template.source, named)
    controls = _Controls(_control_words(template, tokenizer))
    renderer = Renderer(template)
    question, answer, other = Turn(HUMAN, _PROBES[1]), Turn(ASSISTANT, _PROBES[0]), Turn(HUMAN, _PROBES[2])
    try:
        prompt, whole, longer = _render(renderer, controls, [
            ([question], True), ([question, answer], False), ([question, answer, other], False)])
        before, *after = whole.split(_PROBES[0])
        if len(after) != 1:
            raise BadRow("", f"renders an answer {len(after)} times, where it must be exactly once")
        if not (before.startswith(prompt) or prompt.startswith(before)):
            raise BadRow("", f"renders the beginning of an answer as {prompt[-40:]!r} with add_generation_prompt, but as "
                             f"{before[-40:]!r} before an answer")
    except BadRow as error:
        renderer.close()
        raise UserError(f"--template {path}: {error}; correct the template, or choose another") from None
    following = longer.partition(_PROBES[0])[2].partition(_PROBES[2])[0]
    first = controls.pieces(prompt, False, True)[0]
    made = JinjaTemplate(
        path, template.fingerprint, first.is_control and tokenizer.control[first.text] == tokenizer.end_of_text,
        tuple(text for text in [following.rstrip()] if text.strip() and not controls.pieces(text, False, True)[0].is_control),
        _ending(controls, after[0], following, prompt[len(before):]), controls, renderer)
    weakref.finalize(made, renderer.close)
    return made


def _ending(controls: _Controls, end: str, following: str, opening: str) -> Ending:
    """What ends an answer, from what follows one at the end of a conversation, and before the user's next turn."""
    for text in (end, following):
        found = next((piece for piece in controls.pieces(text, True, True) if piece.is_control), None)
        if found is not None:
            return Ending((), (found.text,), opening)
        if text.strip():
            return Ending((text.rstrip(),), (), opening)
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


def _render(renderer: Renderer, controls: _Controls, jobs: Sequence[tuple[Sequence[Turn], bool]]) -> list[str]:
    """The renderings of turns, without or with the beginning of an answer. Raises BadRow if one can't be made."""
    results = renderer.render([Job(_messages(turns, controls), open_answer) for turns, open_answer in jobs])
    for result in results:
        if isinstance(result, Fault):
            raise BadRow("not rendered", f"can't be rendered by --template {renderer.template.path}: {result.reason}")
    return [result for result in results if isinstance(result, str)]


def _messages(turns: Sequence[Turn], controls: _Controls) -> list[dict[str, Any]]:
    return [{"role": ROLES[turn.speaker], "content": controls.hide(untouched(turn.text))} for turn in turns]


def _changed(before: str, text: str, after: str) -> str:
    made = text.removeprefix(before).removesuffix(after)
    return f"it becomes {made[:40]!r}" + "..." * (len(made) > 40)
