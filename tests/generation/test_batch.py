"""Batched generation: the package's tokens, no row's text changed by its neighbours, and every way to end an answer."""

import pytest
import torch
from tokenizers import Tokenizer

from src.checkpoint.base import load_base
from src.data.conversation import clean
from src.errors import UserError
from src.generation.batch import ATTEMPTS, generate, prefill
from src.generation.config import Sampling
from src.generation.requests import Request
from src.generation.sampler import count, penalize
from src.generation.vocabulary import read_vocabulary
from src.model import RWKV, build_model
from src.model.decode import Forward, Kernels, decoder_for
from src.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.compiled import compiled
from tests.generation.tiny import PROMPTS, fixed_model, logits_of, random_model
from tests.rwkv_package import package_generate
from tests.states import cat
from tests.tokenizer.files import KINDS, saved

BYTES = load_tokenizer("bytes")


def answers(model, sampling: Sampling, prompts=PROMPTS, seed=0, batch_size=4):
    """All answers by row number."""
    numbered = prompts if isinstance(prompts, dict) else dict(enumerate(prompts))
    requests = [Request(row, tuple(prompt)) for row, prompt in numbered.items()]
    found = list(generate(model, BYTES, requests, sampling, seed, batch_size))
    assert len(found) == len(numbered)
    return {answer.row: answer for answer in found}


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_greedy_tokens_are_the_packages(version, kind, tiny_checkpoints):
    """With penalties, 200 tokens after each prompt. The prompts are read packed here, and one by one there."""
    path = tiny_checkpoints(version, kind, 16)
    arguments = {"temperature": 0, "alpha_frequency": 1.0, "alpha_presence": 0.2, "alpha_decay": 0.996, "token_ban": [0]}
    expected = package_generate(path, version, [list(prompt) for prompt in PROMPTS], 200, arguments)
    weights, dimensions = load_base(path)
    sampling = Sampling(temperature=0, presence=0.2, max_tokens=200, stop=())
    exact = build_model(weights, dimensions, torch.float64)
    closed = [first_open_step(exact, prompt, tokens, sampling) for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    assert sum(closed) > 0.8 * 200 * len(PROMPTS)
    for engine in (decoder_for(build_model(weights, dimensions)), Forward(build_model(weights, dimensions))):
        ours = answers(engine, sampling)
        for row, (theirs, alike) in enumerate(zip(expected, closed, strict=True)):
            assert ours[row].tokens[:alike] == theirs[:alike] and len(ours[row].tokens) == len(theirs)
    assert len({tuple(tokens) for tokens in expected}) > len(PROMPTS) // 2


def first_open_step(exact: RWKV, prompt: bytes, tokens: list[int], sampling: Sampling) -> int:
    """At which of these tokens, each the likeliest after those before it, another one is within rounding of it in float64.

    Those of float32 are off by 1e-5 in norm (tests/model/test_logits.py), each of 256 by some 1e-6 of the norm; 4e-6 are taken.
    """
    hidden, _ = exact(torch.tensor([*prompt, *tokens]))
    logits = exact.logits(hidden[len(prompt) - 1:-1]).index_fill(1, torch.tensor([0]), -torch.inf)
    bounds = 4e-6 * logits[:, 1:].norm(dim=1)
    weight = read_vocabulary(BYTES, 256, []).weight
    times, seen = torch.zeros(1, 256, dtype=torch.float64), torch.zeros(1, 256, dtype=torch.bool)
    for step, (token, bound) in enumerate(zip(tokens, bounds, strict=True)):
        lowered = penalize(logits[step], times, seen, sampling.presence, sampling.frequency)[0]
        if (lowered >= lowered.max() - bound).sum() > 1:
            return step
        assert token == int(lowered.argmax())
        count(times, seen, torch.tensor([token]), weight, sampling.penalty_decay)
    return len(tokens)


def test_greedy_tokens_are_the_argmax_of_the_model_alone():
    """In float64, where no two tokens lie within rounding of each other."""
    model = random_model("x070", torch.float64)
    ours = answers(model, Sampling(temperature=0, frequency=0, max_tokens=12, stop=(), ban_end_of_text=False))
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(12):
            hidden, _ = model(torch.tensor(text))
            text.append(int(model.logits(hidden[-1]).argmax()))
        assert ours[row].tokens == text[len(prompt):]


@compiled
@pytest.mark.parametrize(("version", "dtype"), [("x070", torch.float32), ("x060", torch.float32), ("x070", torch.bfloat16)])
def test_a_rows_answer_depends_on_seed_row_and_prompt_alone(version, dtype):
    """By the kernels to the last bit, so that this holds at any precision and not only where no two outcomes lie close."""
    model, sampling = random_model(version, dtype), Sampling(top_p=0.95, max_tokens=30, stop=("e",))
    model.head.weight[ord("e")] *= 5  # likely now and then, so that rows end at different times
    model = decoder_for(model)
    assert isinstance(model, Kernels)
    whole = answers(model, sampling, seed=7, batch_size=3)
    assert len({len(answer.tokens) for answer in whole.values()}) > 2
    for batch_size in (1, 2, 100):
        assert answers(model, sampling, seed=7, batch_size=batch_size) == whole
    some = dict(reversed(list(enumerate(PROMPTS))[2:5]))
    assert answers(model, sampling, some, seed=7) == {row: whole[row] for row in some}
    assert answers(model, sampling, seed=8) != whole
    model.ahead = 3  # as on a GPU: what a step drew is looked at three steps later
    for batch_size in (1, 3, 100):
        assert answers(model, sampling, seed=7, batch_size=batch_size) == whole
    same_prompt = answers(model, sampling, [PROMPTS[0]] * 2, seed=7)
    assert same_prompt[0].tokens == whole[0].tokens != same_prompt[1].tokens


@compiled
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_prompts_read_in_pieces_give_what_each_gives_alone(version):
    """By the model's forward up to rounding in float64; by the kernels to the last bit, behind a common beginning too."""
    model = random_model(version, torch.float64)
    alone = [model(torch.tensor(list(prompt))) for prompt in PROMPTS]
    kernels = decoder_for(random_model(version))
    exact, exact_state = zip(*(prefill(kernels, [prompt]) for prompt in PROMPTS), strict=True)
    start = prefill(kernels, [b"User: "])[1]
    for budget in (5, 17, 64, 10**6):
        hidden, state = prefill(Forward(model), PROMPTS, budget=budget)
        torch.testing.assert_close(hidden, torch.stack([h[-1] for h, _ in alone]), rtol=1e-9, atol=1e-9)
        expected = cat([state for _, state in alone])
        ours, our_state = prefill(kernels, PROMPTS, budget=budget)
        forked, forked_state = prefill(kernels, [prompt[6:] for prompt in PROMPTS], start=start, budget=budget)
        assert ours.equal(torch.cat(exact)) and forked.equal(ours)
        for part in ("att_shift", "wkv", "ffn_shift"):
            torch.testing.assert_close(getattr(state, part), getattr(expected, part), rtol=1e-9, atol=1e-9)
            for layer, fork, one in zip(getattr(our_state, part), getattr(forked_state, part),
                                        getattr(cat(exact_state), part), strict=True):
                assert layer.equal(one) and fork.equal(one)


def test_the_batch_stays_full_while_prompts_wait():
    drawn, left = [], 40
    finished = []

    def on_tokens(count):
        assert count == min(5, 40 - len(finished))
        drawn.append(count)

    model = fixed_model(logits_of(a=2.0, newline=2.0))
    for answer in generate(model, BYTES, [Request(row, (120,)) for row in range(left)], Sampling(top_p=1.0), 0, 5, on_tokens):
        finished.append(answer)
    assert sorted(answer.row for answer in finished) == list(range(40))
    assert sum(drawn) == sum(len(answer.tokens) for answer in finished)
    assert len({len(answer.tokens) for answer in finished}) > 3


class Counting:
    """An engine that counts the tokens of prompts it reads and, if told, has memory for so many rows only."""

    def __init__(self, engine, most=10**6):
        self.engine, self.most, self.read = engine, most, 0
        self.dimensions, self.device, self.logits = engine.dimensions, engine.device, engine.logits
        self.ahead, self.captures = engine.ahead, engine.captures

    def fresh(self, n):
        return self.engine.fresh(n)

    def advance(self, tokens, cu_seqlens, state):
        self.read += len(tokens)
        return self._with_room(self.engine.advance, tokens, cu_seqlens, state)

    def advance_each(self, tokens, state):
        return self._with_room(self.engine.advance_each, tokens, state)

    def _with_room(self, work, *arguments):
        if len(arguments[-1].wkv[0]) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return work(*arguments)


def test_equal_prompts_and_a_common_beginning_are_read_once():
    engine = decoder_for(random_model("x070"))
    requests = [Request(row, tuple(PROMPTS[row % 3]), sample) for row in range(9) for sample in range(3)]
    sampling = Sampling(top_p=0.95, max_tokens=5)
    for size in (27, 4):
        counting = Counting(engine)
        found = {answer[:2]: answer for answer in generate(counting, BYTES, requests, sampling, 3, size)}
        if size == 27:
            assert counting.read == 6 + sum(len(prompt) - 6 for prompt in PROMPTS[:3])  # "User: " and what follows it
        alone = [next(generate(engine, BYTES, [request], sampling, 3, 1)) for request in requests]
        assert found == {answer[:2]: answer for answer in alone}
    assert len({answer.text for answer in alone}) > 20


@pytest.mark.parametrize(("size", "order", "read"), [
    (4, "aaaaaaaabbbbbbbb", "ab"), (4, "aaaaabaaaabaa", "aba"), (4, "ab", "ab"), (8, "bbbbaaaaaaaaaacccb", "bac")])
def test_an_equal_prompt_is_read_once_as_long_as_a_row_with_it_waits(size, order, read):
    """One state is kept for every four rows of the batch: that of a prompt that no row waits for is dropped, else the oldest."""
    counting = Counting(decoder_for(random_model("x070")))
    prompts = {"a": tuple(b"a" * 50), "b": tuple(b"b" * 70), "c": tuple(b"c" * 110)}
    requests = [Request(row, prompts[name]) for row, name in enumerate(order)]
    assert len(list(generate(counting, BYTES, requests, Sampling(top_p=0.95, max_tokens=1), 3, size))) == len(order)
    assert counting.read == sum(len(prompts[name]) for name in read)


@pytest.mark.parametrize("ahead", [0, 2])
def test_where_memory_runs_out_the_batch_is_halved_and_the_texts_stay(ahead, capsys):
    engine, sampling = decoder_for(random_model("x070")), Sampling(top_p=0.95, max_tokens=9)
    engine.ahead = ahead
    whole = answers(engine, sampling)
    for most in (1, 2, 3):
        assert answers(Counting(engine, most), sampling, batch_size=6) == whole
    assert capsys.readouterr().err.splitlines()[0] == "memory ran out; continuing with 3 rows at a time"
    with pytest.raises(RuntimeError, match="can't allocate"):
        answers(Counting(engine, 0), sampling)


class Failing(Counting):
    """Runs out of memory once, at this step after the first."""

    def __init__(self, engine, step: int):
        super().__init__(engine)
        self.steps = step

    def advance_each(self, tokens, state):
        self.steps -= 1
        if not self.steps:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return super().advance_each(tokens, state)


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 5, 12])
def test_rows_that_were_being_written_when_memory_ran_out_are_written_again(ahead, step):
    engine, sampling = decoder_for(random_model("x070")), Sampling(top_p=0.95, max_tokens=9)
    engine.ahead = ahead
    assert answers(Failing(engine, step), sampling, batch_size=3) == answers(engine, sampling)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_refused_answer_is_drawn_again_and_stands_at_last(ahead):
    engine, sampling = decoder_for(random_model("x070")), Sampling(top_p=0.95, max_tokens=9)
    engine.ahead = ahead
    requests = [Request(row, tuple(prompt)) for row, prompt in enumerate(PROMPTS)]
    first = {answer.row: answer for answer in generate(engine, BYTES, requests, sampling, 0, 3)}
    refused = first[2].text
    anew = generate(engine, BYTES, requests, sampling, 0, 3, refuse=lambda x: x.text == refused)
    again = {answer.row: answer for answer in anew}
    assert again.pop(2).text != refused and again == {row: answer for row, answer in first.items() if row != 2}
    tries = []
    stubborn = generate(engine, BYTES, requests[:1], sampling, 0, 3, refuse=lambda x: tries.append(x.text) or True)
    assert [answer.refused for answer in stubborn] == [True] and len(tries) == len(set(tries)) == ATTEMPTS


def test_a_blank_line_ends_an_answer_across_tokens():
    model = fixed_model(logits_of(a=2.0, newline=1.5))
    for answer in answers(model, Sampling(top_p=1.0, frequency=0), [b"x"] * 30).values():
        written = bytes(answer.tokens).decode()
        assert answer.reason == "stop" and written.endswith("\n\n") and "\n\n" not in written.lstrip("\n")[:-2]
        assert answer.text == written.strip() != ""


def test_a_stop_of_ones_own_and_none_at_all():
    model = fixed_model(logits_of(a=2.0, b=2.0, newline=1.0))
    for answer in answers(model, Sampling(top_p=1.0, frequency=0, stop=("abab",)), [b"x"] * 10).values():
        assert answer.reason == "stop" and bytes(answer.tokens).decode().removesuffix("abab").strip().replace("\n\n", "\n")
        assert "abab" not in answer.text
    endless = answers(model, Sampling(top_p=1.0, frequency=0, stop=(), max_tokens=200), [b"x"])[0]
    assert endless.reason == "max_tokens" and len(endless.tokens) == 200 and b"\n\n" in bytes(endless.tokens)


def test_an_answer_is_never_empty():
    """Blanks are by far the likeliest here; whatever would end the row blank is drawn anew, up to the last token."""
    model = fixed_model(logits_of(newline=9.0, space=5.0, a=0.0))
    greedy = answers(model, Sampling(temperature=0, frequency=0, max_tokens=7), [b"x"])[0]
    assert bytes(greedy.tokens) == b"\n \n \n a" and greedy.text == "a" and greedy.reason == "max_tokens"
    for sampling in (Sampling(max_tokens=30), Sampling(max_tokens=1), Sampling(top_p=1.0, max_tokens=5)):
        assert {answer.text for answer in answers(model, sampling, [b"x"] * 10).values()} == {"a"}
    # Half a character is no text either: it waits for the rest, which no token is left for.
    half = fixed_model(logits_of(é=9.0, a=0.0))
    assert answers(half, Sampling(max_tokens=1), [b"x"])[0].text == "a"


def test_the_end_of_text_is_never_drawn_unless_allowed():
    model = fixed_model(logits_of(end=9.0, a=3.0, b=3.0))
    for answer in answers(model, Sampling(top_p=1.0, max_tokens=40), [b"x"] * 5).values():
        assert 0 not in answer.tokens and answer.reason == "max_tokens"
    allowed = answers(model, Sampling(top_p=1.0, max_tokens=40, ban_end_of_text=False), [b"x"] * 5)
    assert {answer.reason for answer in allowed.values()} == {"end_of_text"}
    assert all(answer.tokens[-1] == 0 and answer.text for answer in allowed.values())


def test_logits_that_are_not_finite_are_told_with_the_row():
    model = random_model("x070")
    model.emb.weight[ord("q")] = torch.nan
    with pytest.raises(UserError, match="row 2, token 1 of its answer are not finite"):
        answers(model, Sampling(), [b"a", b"q"])


@pytest.mark.parametrize("stop", ["\n\n", "the c", " t", "e"])
@pytest.mark.parametrize("kind", ["Prepend without bytes", "Metaspace first", "Unigram", "ByteLevel"])
def test_with_a_hugging_face_tokenizer_answers_are_what_the_library_decodes_up_to_the_stop(kind, stop, tmp_path):
    """Its decoders take a space off the text they are given; an answer ends at the first token that completes the stop."""
    tokenizer = HuggingFaceTokenizer(saved(KINDS[kind](), tmp_path))
    library = Tokenizer.from_file(tokenizer.name)
    logits, likely = torch.full((tokenizer.vocab_size,), -20.0), torch.Generator().manual_seed(1)
    for token in tokenizer.encode("the cat sat\n\nUser Assistant the te c", continues=True):
        logits[token] = torch.rand((), generator=likely)
    prompts = [tuple(tokenizer.encode("User: the\n\nAssistant:"))] * 20
    requests = [Request(row, prompt) for row, prompt in enumerate(prompts)]
    sampling = Sampling(top_p=1.0, frequency=0.0, max_tokens=100, stop=(stop,))
    found = list(generate(fixed_model(logits), tokenizer, requests, sampling, 0, 8))

    def decoded(tokens: list[int]) -> str:
        """Behind an x, which keeps the decoder off the first space."""
        before = tokenizer.encode("x")
        whole = library.decode(before + tokens, skip_special_tokens=False)
        return whole[len(library.decode(before, skip_special_tokens=False)):]

    assert len(found) == 20 and sum(answer.reason == "stop" for answer in found) > 3
    for answer in found:
        text = decoded(answer.tokens)
        assert answer.text == clean(text.partition(stop)[0])
        assert (answer.reason == "stop") == (stop in text) and stop not in decoded(answer.tokens[:-1])
