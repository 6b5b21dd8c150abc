"""Packing against one pair at a time in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.packing import Text, pack_pairs, pack_texts, packed_length
from src.data.token_lists import TokenPair

# Few tokens, so that prompts repeat.
prompts = st.lists(st.integers(0, 2), max_size=3)
answers = st.lists(st.integers(0, 65535), min_size=1, max_size=6)
pair_lists = st.lists(st.tuples(prompts, answers, answers), min_size=1, max_size=5)
# One answer may be empty, and of the others a part has no loss.
answered = st.tuples(prompts, st.just([]) | answers, answers, st.integers(0, 5), st.integers(0, 5), st.booleans())


def one_sided(prompt, some, answer, some_from, answer_from, up) -> TokenPair:
    pair = TokenPair(prompt, some, answer, some_from % max(len(some), 1), answer_from % len(answer))
    return TokenPair(prompt, answer, some, pair.reject_from, pair.chosen_from) if up else pair


with_thumbs = st.lists(answered.map(lambda parts: one_sided(*parts)), min_size=1, max_size=5)


def inputs_up_to(batch, position: int) -> list[int]:
    """What the model has read at a position: its own sequence so far, after the whole of its prompt."""
    starts, n_prompts = batch.cu_seqlens.tolist(), batch.n_prompts
    sequence = max(s for s in range(len(starts) - 1) if starts[s] <= position < starts[s + 1])
    own = batch.tokens[starts[sequence]:position + 1].tolist()
    if sequence < n_prompts:
        return own
    prompt = int(batch.parents[sequence - n_prompts])
    return batch.tokens[starts[prompt]:starts[prompt + 1]].tolist() + own


def predictions(batch, *columns) -> list[tuple]:
    rows = zip(*(x.tolist() for x in columns), strict=True)
    return [(of, inputs_up_to(batch, at), token) for of, at, token in rows]


@given(pairs=pair_lists, share_prompts=st.booleans())
def test_every_token_of_an_answer_is_predicted_from_all_before_it(pairs, share_prompts):
    batch = pack_pairs([TokenPair(*pair) for pair in pairs], share_prompts)
    expected = []
    for number, (prompt, chosen, reject) in enumerate(pairs):
        for which, answer in enumerate((chosen, reject)):
            for place, token in enumerate(answer):
                expected.append((2 * number + which, (prompt or [0]) + answer[:place], token))
    assert predictions(batch, batch.answer_of, batch.answer_positions, batch.answer_targets) == expected

    distinct = {tuple(prompt) or (0,) for prompt, *_ in pairs}
    assert batch.n_prompts == len(distinct) if share_prompts else 2 * len(pairs)
    starts = batch.cu_seqlens.tolist()
    whole = [batch.tokens[starts[of]:starts[of + 1]].tolist() for of in range(batch.n_prompts)]
    expected = [(of, prompt[:place], prompt[place]) for of, prompt in enumerate(whole) for place in range(1, len(prompt))]
    assert predictions(batch, batch.prompt_of, batch.prompt_positions, batch.prompt_targets) == expected
    assert batch.cu_seqlens.dtype == torch.int32
    assert all(x.dtype == torch.int64 for name, x in vars(batch).items() if name != "cu_seqlens")


@given(pairs=with_thumbs, share_prompts=st.booleans())
def test_only_answers_that_are_there_are_computed_and_only_their_last_part_has_a_loss(pairs, share_prompts):
    batch, expected = pack_pairs(pairs, share_prompts), []
    for number, (prompt, *answers, chosen_from, reject_from) in enumerate(pairs):
        for which, (answer, start) in enumerate(zip(answers, (chosen_from, reject_from), strict=True)):
            for place in range(start, len(answer)):
                expected.append((2 * number + which, (prompt or [0]) + answer[:place], answer[place]))
    assert predictions(batch, batch.answer_of, batch.answer_positions, batch.answer_targets) == expected
    there = [bool(answer) for pair in pairs for answer in (pair.chosen, pair.reject)]
    assert len(batch.parents) == sum(there) == len(batch.cu_seqlens) - 1 - batch.n_prompts
    assert batch.answer_tokens.tolist() == [sum(of == number for of, *_ in expected) for number in range(len(there))]
    starts = batch.cu_seqlens.tolist()
    whole = [batch.tokens[starts[of]:starts[of + 1]].tolist() for of in range(batch.n_prompts)]
    assert [whole[of] for of in batch.answer_prompts.tolist()] == [pair.prompt or [0] for pair in pairs for _ in range(2)]
    assert batch.prompt_tokens.tolist() == [max(len(pair.prompt), 1) - 1 for pair in pairs for _ in range(2)]
    needed = {tuple(pair.prompt) or (0,) for pair in pairs} if share_prompts else [pair for pair, answer in zip(
        (pair for pair in pairs for _ in range(2)), there, strict=True) if answer]
    assert batch.n_prompts == len(needed)


@given(pairs=pair_lists | with_thumbs)
def test_the_length_told_is_the_length_packed(pairs):
    for pair in (TokenPair(*pair) for pair in pairs):
        assert packed_length(pair) == len(pack_pairs([pair]).tokens)
        assert packed_length(pair) + packed_length(pair, shared=True) == len(pack_pairs([pair, pair]).tokens)


def test_an_answer_is_predicted_whole_even_after_an_empty_prompt():
    batch = pack_pairs([TokenPair([], [7, 8], [9])])
    assert batch.tokens.tolist() == [0, 7] and batch.answer_targets.tolist() == [7, 8, 9]
    assert batch.answer_positions.tolist() == [0, 1, 0] and batch.answer_of.tolist() == [0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 1, 2, 2] and batch.prompt_positions.tolist() == []


def test_moving_keeps_the_sequence_starts_on_the_cpu():
    moved = pack_pairs([TokenPair([1], [2], [3])]).to("meta")
    assert moved.tokens.device.type == moved.answer_of.device.type == moved.parents.device.type == "meta"
    assert moved.cu_seqlens.device.type == "cpu" and moved.n_prompts == 1


marked = st.lists(st.tuples(st.integers(0, 65535), st.booleans()), min_size=2, max_size=6)


@given(texts=st.lists(marked.map(lambda pairs: Text(*map(list, zip(*pairs, strict=True)))), min_size=1, max_size=5))
def test_marked_tokens_of_a_text_are_predicted_from_all_before_them_in_it(texts):
    batch = pack_texts(texts)
    starts = batch.cu_seqlens.tolist()
    found = []
    for at, token in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True):
        start = max(start for start in starts[:-1] if start <= at)
        found.append((batch.tokens[start:at + 1].tolist(), token))
    expected = [(text.tokens[:place], text.tokens[place]) for text in texts for place in range(1, len(text.tokens))
                if text.trained[place]]
    assert found == expected
    assert len(batch.tokens) == sum(map(packed_length, texts)) == starts[-1]
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.positions.device.type == "meta" and moved.cu_seqlens.device.type == "cpu"
