"""Dimensions and completeness of checkpoints: the releases' sizes, tiny ones, and everything that is not a v6 or v7 model.

The tensors are on the meta device, which has shapes and no data, so the true sizes cost nothing.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.checkpoint.dimensions import check_weights, expected_shapes, read_dimensions
from src.errors import UserError
from tests.random_checkpoint import make_dimensions

TINY = [make_dimensions("x060", 2, 32, 16, 50, ranks={"mix": 3, "decay": 5}),
        make_dimensions("x070", 2, 32, 16, 50, ranks={"w": 3, "a": 4, "v": 5, "g": 6})]


def blank(shapes, dtype=torch.bfloat16):
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}


def refusal(weights, check=True) -> str:
    with pytest.raises(UserError) as caught:
        dimensions = read_dimensions(weights, "model.pth")
        if check:
            check_weights(weights, dimensions, "model.pth")
    message = str(caught.value)
    assert message.startswith("model.pth: ") and "\n" not in message
    return message


# Sizes


@pytest.mark.parametrize("n_layer, n_embd, ranks", [
    # Low-rank widths of decay, learning rate, value mix and gate in the RWKV-7 paper's table of model sizes;
    # the last, 7.2B, as released.
    (12, 768, (64, 64, 32, 128)), (24, 1024, (64, 64, 32, 128)), (24, 2048, (96, 96, 64, 256)), (32, 2560, (96, 96, 64, 320)),
    (32, 4096, (128, 128, 96, 480)),
])
def test_v7_releases(n_layer, n_embd, ranks):
    dimensions = make_dimensions("x070", n_layer, n_embd, 64, 65536)
    assert tuple(dimensions.rank(key) for key in "wavg") == ranks
    weights = blank(expected_shapes(dimensions))
    found = read_dimensions(weights, "model.pth")
    assert (found.version, found.n_layer, found.n_embd, found.vocab_size) == ("x070", n_layer, n_embd, 65536)
    assert (found.n_head, found.head_size, found.n_ffn, found.dtype) == (n_embd // 64, 64, 4 * n_embd, torch.bfloat16)
    check_weights(weights, found, "model.pth")
    # The RWKV-7 paper's count of parameters (appendix on the architecture).
    d = n_embd
    expected = 2 * d * 65536 + 4 * d + n_layer * d * (12 * d + 2 * sum(ranks) + 19) - (2 * d * ranks[2] + d)
    assert sum(tensor.numel() for tensor in weights.values()) == expected


@pytest.mark.parametrize("n_layer, n_embd", [(24, 2048), (32, 2560)])
def test_v6_releases(n_layer, n_embd):
    dimensions = make_dimensions("x060", n_layer, n_embd, 64, 65536)
    weights = blank(expected_shapes(dimensions))
    found = read_dimensions(weights, "model.pth")
    assert (found.version, found.n_layer, found.n_embd) == ("x060", n_layer, n_embd)
    assert (found.n_head, found.head_size) == (n_embd // 64, 64)
    assert (found.n_ffn, found.rank("mix"), found.rank("decay")) == (int(3.5 * n_embd), 32, 64)
    check_weights(weights, found, "model.pth")
    # The Eagle and Finch paper's count of parameters for Finch.
    d = n_embd
    assert sum(tensor.numel() for tensor in weights.values()) == 2 * d * 65536 + 13 * d * d * n_layer + 464 * d * n_layer + 4 * d


@st.composite
def any_dimensions(draw):
    version = draw(st.sampled_from(["x060", "x070"]))
    head_size = draw(st.sampled_from([8, 16, 32, 64]))
    ranks = {key: draw(st.integers(1, 40)) for key in (["mix", "decay"] if version == "x060" else ["w", "a", "v", "g"])}
    return make_dimensions(version, draw(st.integers(1, 4)), head_size * draw(st.integers(1, 4)), head_size,
                           draw(st.integers(1, 300)), draw(st.integers(1, 300)), ranks)


@given(dimensions=any_dimensions(), data=st.data())
def test_dimensions_are_read_back_whatever_the_order(dimensions, data):
    shapes = expected_shapes(dimensions)
    weights = blank({key: shapes[key] for key in data.draw(st.permutations(sorted(shapes)))}, torch.float32)
    assert read_dimensions(weights, "model.pth") == dimensions
    check_weights(weights, dimensions, "model.pth")


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_vectors_may_come_flat_or_with_two_axes_of_one(dimensions):
    for shape_of in (lambda n: (n,), lambda n: (1, 1, n)):
        shapes = {key: shape_of(math.prod(shape)) if len(shape) != 2 and math.prod(shape) == max(shape) else shape
                  for key, shape in expected_shapes(dimensions).items()}
        weights = blank(shapes)
        check_weights(weights, read_dimensions(weights, "model.pth"), "model.pth")


def test_the_value_residual_of_block_0_is_optional():
    dimensions = TINY[1]
    shapes = expected_shapes(dimensions)
    assert "blocks.1.att.v1" in shapes and "blocks.0.att.v1" not in shapes
    weights = blank(shapes | {f"blocks.0.att.v{i}": shapes[f"blocks.1.att.v{i}"] for i in range(3)}, torch.float32)
    assert read_dimensions(weights, "model.pth") == dimensions
    check_weights(weights, dimensions, "model.pth")


# What is refused


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_each_missing_tensor_is_refused(dimensions):
    shapes = expected_shapes(dimensions)
    telling = {"emb.weight", "blocks.0.att.r_k", "blocks.0.att.time_maa_w1"}  # without these it is another kind of file
    for key in shapes:
        message = refusal(blank({other: shape for other, shape in shapes.items() if other != key}))
        assert key in telling or f"{key} is missing" in message, message


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_each_axis_of_each_tensor_that_contradicts_the_others_is_refused(dimensions):
    shapes = expected_shapes(dimensions)
    for key, shape in shapes.items():
        for axis in range(len(shape)):
            wrong = [size + (i == axis) for i, size in enumerate(shape)]
            refusal(blank(shapes | {key: tuple(wrong)}))


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_a_matrix_may_not_come_flat_or_turned(dimensions):
    # A low rank of 1 makes matrices that look like vectors.
    shapes = expected_shapes(replace(dimensions, ranks=tuple((key, 1) for key, _ in dimensions.ranks)))
    for key, shape in shapes.items():
        if len(shape) == 2 and shape[0] != shape[1]:
            refusal(blank(shapes | {key: shape[::-1]}))
            refusal(blank(shapes | {key: (math.prod(shape),)}))


def test_the_message_has_both_shapes():
    shapes = expected_shapes(TINY[1])
    assert refusal(blank(shapes | {"head.weight": (49, 32)})) == \
        "model.pth: head.weight has shape 49 x 32, expected 50 x 32 by the file's other tensors"


@pytest.mark.parametrize("extra", ["blocks.0.att.time_state", "blocks.1.att.key.lora_A", "blocks.1.ffn.s0", "something", "a\nb"])
@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_a_tensor_no_model_has_is_refused(dimensions, extra):
    assert f"{extra!r} belongs to no {dimensions.version} model" in refusal(blank(expected_shapes(dimensions) | {extra: (2,)}))


def test_the_unread_value_residual_is_unknown_in_v6():
    assert "belongs to no" in refusal(blank(expected_shapes(TINY[0]) | {"blocks.0.att.v0": (2,)}))


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_integers_are_refused(dimensions):
    weights = blank(expected_shapes(dimensions))
    weights["blocks.1.att.key.weight"] = weights["blocks.1.att.key.weight"].to(torch.uint8)
    assert "blocks.1.att.key.weight holds torch.uint8" in refusal(weights)


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_a_missing_block_is_named(dimensions):
    shapes = expected_shapes(dimensions) | {f"blocks.3.{norm}": (32,) for norm in ("ln1.weight", "ln1.bias")}
    assert "block 2 is missing" in refusal(blank(shapes))


def test_heads_that_do_not_fill_the_width_are_refused():
    shapes = {key: (2, 16) if key.endswith("r_k") else shape for key, shape in expected_shapes(TINY[1]).items()}
    assert read_dimensions(blank(shapes), "model.pth").n_head == 2
    shapes["blocks.0.att.r_k"] = (3, 16)
    assert "3 x 16, which does not make n_embd 32" in refusal(blank(shapes), check=False)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_heads_of_width_1_are_refused_and_the_next_are_supported(version):
    assert "has shape 4 x 1, but heads of width 1" in refusal(blank(expected_shapes(make_dimensions(version, 2, 4, 1, 50))))
    weights = blank(expected_shapes(make_dimensions(version, 2, 4, 2, 50)))
    assert read_dimensions(weights, "model.pth").head_size == 2


OLD_BLOCK = [
    "ln0.weight", "ln1.weight", "ln2.weight", "att.key.weight", "att.value.weight", "att.receptance.weight", "att.output.weight",
    "att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "att.time_decay",
    "ffn.time_mix_k", "ffn.time_mix_r", "ffn.key.weight", "ffn.receptance.weight", "ffn.value.weight",
]
OLDER = {
    "v4": ["att.time_first"],
    "v5": ["att.time_first", "att.ln_x.weight", "att.ln_x.bias"],
    "v5.2": ["att.time_faaaa", "att.time_mix_g", "att.gate.weight", "att.ln_x.weight", "att.ln_x.bias"],
}


@pytest.mark.parametrize("further", OLDER.values(), ids=OLDER.keys())
def test_older_versions_are_told_apart(further):
    shapes = {"emb.weight": (50, 32), **{f"blocks.0.{key}": (32, 32) for key in OLD_BLOCK + further}, "head.weight": (50, 32)}
    assert "older than v6" in refusal(blank(shapes), check=False)


@pytest.mark.parametrize("shapes", [
    {"a": (2,)},
    {"emb.weight": (5, 4)},
    {"model.embed_tokens.weight": (5, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4)},
    {"rwkv.embeddings.weight": (5, 4), "rwkv.blocks.0.attention.key.weight": (4, 4)},
    {"emb.weight": (5, 4), "blocks.0.attn.q.weight": (4, 4)},
    {"emb.weight": (5, 4), "blocks.x.attn.q.weight": (4, 4)},
])
def test_other_models_are_refused(shapes):
    assert "RWKV" in refusal(blank(shapes), check=False)


def test_strange_block_numbers_are_no_traceback():
    shapes = expected_shapes(TINY[1])
    for key in ("blocks.x.ln1.weight", "blocks.", "blocks.-1.ln1.weight", "blocks.1"):
        refusal(blank(shapes | {key: (32,)}))


def test_deepembed_is_named():
    assert "DeepEmbed" in refusal(blank(expected_shapes(TINY[1]) | {"blocks.0.ffn.s_emb.weight": (50, 1024)}), check=False)


@pytest.mark.parametrize("key, shape, expected", [
    ("emb.weight", (50,), "1 axes, expected 2"), ("emb.weight", (0, 32), "is empty"), ("blocks.0.att.r_k", (32,), "1 axes"),
    ("blocks.0.ffn.key.weight", (), "0 axes"), ("blocks.1.att.v1", (32, 0), "is empty"),
])
def test_shapes_without_meaning_are_named(key, shape, expected):
    message = refusal(blank(expected_shapes(TINY[1]) | {key: shape}), check=False)
    assert key in message and expected in message


def test_a_block_of_a_number_that_is_none_is_refused():
    weights = blank(expected_shapes(TINY[0]))
    assert len(refusal(weights | {f"blocks.{'9' * 5000}.ln1.weight": weights["blocks.0.ln1.weight"]})) < 300
