"""A `Template` made of a Jinja chat template: where an answer begins and ends is found by rendering.

Texts go into the rendering without their outer white space, which in a transcript is not theirs, and otherwise unchanged, but
control words in them are hidden from what splits the result at the template's own control words. A template must reproduce every
answer exactly once and unchanged, after exactly what it renders as the prompt.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from src.console import say
from src.data.chat_template import read_chat_template
from src.data.conversation import ASSISTANT, Turn, answer_places, untouched
from src.data.faults import BadRow
from src.data.jinja_probe import ANSWER, Controls, Learned, Renderings, Task, around_answer, learn
from src.data.rendering import ChatTemplate, Renderer
from src.data.templates import LONGEST_STOPS, Ending, Piece
from src.errors import UserError
from src.tokenizer import Tokenizer
from src.tokenizer.base import END_OF_TEXT, END_OF_TEXT_IN_RWKV


@dataclass(frozen=True)
class JinjaTemplate:
    """See `Template`. Made by `jinja_template`."""

    name: str
    fingerprint: str
    begins_with_end_of_text: bool
    answers_apart: bool
    turn_marks: tuple[str, ...]
    ending: Ending
    controls: Controls
    renderings: Renderings
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
        before, after = around_answer(probe, self.name)
        answer = self.controls.hide(untouched(answer))
        # What a template opens an answer with, as an empty thinking part, it may leave to an answer that has its own.
        itself = prompt.startswith(text[:-len(answer + after)]) and text.endswith(answer + after)
        if text != f"{before}{answer}{after}" and not itself:
            made = text.removeprefix(before if text.startswith(before) else prompt).removesuffix(after)
            made = self.controls.show(made)
            raise BadRow("answer changed", f"is changed by --template {self.name}: it becomes {made[:40]!r}"
                                           f"{'...' * (len(made) > 40)}; correct the template, or the answer")
        if not text.startswith(prompt):
            end = self.controls.show(prompt)[-40:]
            raise BadRow("answer does not follow", f"does not follow the prompt as --template {self.name} renders it, which ends "
                                                   f"in {end!r}; correct the template, or the answer")
        if not whole.startswith(text):
            raise BadRow("turns change", f"has an answer that --template {self.name} renders otherwise once further turns "
                                         "follow; train only on last answers, or correct the template")


def fingerprint_of(path: str) -> str:
    """The `fingerprint` of a file's template. Raises UserError for a file that is no chat template."""
    return _named(path).fingerprint


def _named(path: str) -> ChatTemplate:
    """A file's template, in which the special tokens that it does not name are the end of text."""
    template = read_chat_template(path)
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | dict(template.special_tokens)
    return ChatTemplate(template.path, template.source, named)


def jinja_template(path: str, tokenizer: Tokenizer) -> JinjaTemplate:
    """The template of a file. One that can't render a question and its answer has a fault, which the first row then reports.

    Notes on stderr say where RWKV's name for the end of text becomes plain text, since the tokenizer has no such token, where no
    end of an answer is learned, and where prompts lack what begins an answer.

    Raises UserError for a file that is no chat template, or that names tokens which the tokenizer lacks.
    """
    template = _named(path)
    controls, renderer = Controls(_control_words(template, tokenizer)), Renderer(template)
    renderings = Renderings(renderer, controls)
    fault = None
    try:
        learned = learn(renderings, controls, path)
    except BadRow as error:
        fault, learned = error, Learned(False, False, (), Ending((), (END_OF_TEXT,)), True)
    if (length := sum(len(stop.encode()) for stop in learned.ending.stops)) > LONGEST_STOPS:
        raise UserError(f"--template {path}: the text that it ends an answer with has {length} bytes, of at most "
                        f"{LONGEST_STOPS}; correct the template")
    if END_OF_TEXT_IN_RWKV in template.source and END_OF_TEXT_IN_RWKV not in controls.words:
        say(f"note: --template {path}: {END_OF_TEXT_IN_RWKV} is plain text with --tokenizer {tokenizer.name}, which has no such "
            "token; write {{ eos_token }} in its place for the end of text")
    if not learned.ends_last_answer:
        say(f"note: --template {path} writes nothing that ends a conversation's last answer, so a model doesn't learn where to "
            "stop; write {{ eos_token }} after answers")
    if lead := learned.ending.lead:
        say(f"note: --template {path} has no {lead!r} in prompts, whatever add_generation_prompt says, so a model writes it "
            "itself: it is trained with the answers, and removed from generated ones")
    made = JinjaTemplate(path, template.fingerprint, learned.begins_with_end_of_text, learned.answers_apart, learned.turn_marks,
                         learned.ending, controls, renderings, fault)
    weakref.finalize(made, renderer.close)
    return made


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


def _tasks(turns: Sequence[Turn], answers: Sequence[int]) -> list[Task]:
    """For each answer the prompt before it, the turns up to it, and the same with a probe in its place."""
    return [task for at in answers for task in (
        (turns[:at], True), (turns[:at + 1], False), ([*turns[:at], Turn(ASSISTANT, ANSWER)], False))]
