"""The kernels that write text: the model's own logits from every kind of weight, and no bit that another sequence changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.checkpoint.random import make_dimensions, random_weights
from src.model import build_model
from src.model.decode import Forward, Kernels, serve
from src.model.panels import RELU_SQUARE, SIGMOID, TANH, Products, lay
from src.quantization.linear import quantize_linear

VOCABULARY = 300
TOKENS = torch.randint(0, VOCABULARY, (222,), generator=torch.Generator().manual_seed(1))
BORDERS = torch.tensor([0, 1, 2, 30, 222], dtype=torch.int32)  # the last is longer than the rows that share a panel


def models(version: str, width: int, head_size: int, dtype: torch.dtype, quantize: str | None):
    """The model in `dtype`, and its weights in a float32 model."""
    dimensions = make_dimensions(version, 3, width, head_size, VOCABULARY)
    weights = random_weights(dimensions)
    rounded = {name: x.to(dtype).float() for name, x in weights.items()}
    head = quantize == "int8"
    return (build_model(weights, dimensions, dtype, "cpu", quantize, quantize_head=head),
            build_model(weights if quantize else rounded, dimensions, torch.float32, "cpu", quantize, quantize_head=head))


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(("width", "head_size"), [(64, 16), (128, 64), (40, 8)])
@pytest.mark.parametrize(("dtype", "quantize", "bound"), [
    # The same sums in another order. In bfloat16 inputs of products are rounded to 8 bits, which weighs as the model's chances
    # have it: no more than 1.3 times what the model's own forward errs by, which rounds everything.
    (torch.float32, None, 2e-6), (torch.float16, None, 2e-6), (torch.bfloat16, None, None),
    (torch.float32, "int8", 2e-6), (torch.bfloat16, "int8", None), (torch.float32, "nf4", 2e-6), (torch.bfloat16, "nf4", None),
])
@torch.inference_mode()
def test_logits_are_the_models(version, width, head_size, dtype, quantize, bound):
    if quantize == "nf4" and width == 40:
        pytest.skip("blocks of NF4 straddle rows: laid out unquantized, as any other weight")
    model, truth = models(version, width, head_size, dtype, quantize)
    hidden, state = truth(TOKENS, BORDERS)
    expected = truth.logits(hidden[BORDERS[1:].long() - 1])
    after = model(TOKENS, BORDERS)
    usual = (model.logits(after[0][BORDERS[1:].long() - 1]) - expected).norm()
    engine = serve(model)
    assert isinstance(engine, Kernels)
    ours = engine.fresh(4)
    logits = engine.logits(engine.advance(TOKENS, BORDERS, ours))
    assert (logits - expected).norm() < (bound * expected.norm() if bound else 1.3 * usual)
    for part in ("att_shift", "wkv", "ffn_shift"):
        for one, other in zip(getattr(ours, part), getattr(state, part), strict=True):
            assert (one - other).norm() < (bound or 0.1) * other.norm()


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(("dtype", "quantize"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")])
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_no_sequence_and_no_cut_changes_a_bit(version, dtype, quantize, threads):
    engine = serve(models(version, 64, 8, dtype, quantize)[0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = engine.fresh(4)
        logits = engine.logits(engine.advance(TOKENS, BORDERS, together))
        for row, (start, end) in enumerate(zip(BORDERS[:-1].tolist(), BORDERS[1:].tolist(), strict=True)):
            alone = engine.fresh(1)
            for piece in TOKENS[start:end].split(7):
                hidden = engine.advance(piece, torch.tensor([0, len(piece)], dtype=torch.int32), alone)
            assert engine.logits(hidden).equal(logits[row:row + 1])
            assert all(x[0].equal(y[row]) for x, y in zip(alone.wkv, together.wkv, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 63), (130, 257), (7, 600)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 95, 96, 97])
def test_products_against_float64(dtype, shape, rows):
    """Every tail: outputs beside panels of 64, inputs beside pairs and blocks, rows beside six and ninety-six."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(rows, shape[1], generator=generator)
    x = x.to(torch.bfloat16).float() if dtype == torch.bfloat16 else x
    products = Products([lay(weight, dtype)] * 4, [0, TANH, SIGMOID, RELU_SQUARE])
    # 600 terms of size 1 in float32, one rounding each without fused multiply-add: about 600^.5 * 2^-24 * 25, and its square.
    exact = x.double() @ weight.double().T
    for found, truth in zip(products(x, x, x, x), (exact, exact.tanh(), exact.sigmoid(), exact.relu() ** 2), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=3e-5, atol=5e-5)
    y, gate = (torch.randn(rows, shape[0], generator=generator) for _ in range(2))
    expected = y + gate * exact
    Products([lay(weight, dtype)]).add_to(y, x, gate)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_are_those_that_training_sees(mode, dtype):
    """The identity times W gives W, to the last bit; in bfloat16 W before it is rounded, or NF4's values rounded instead."""
    layer = quantize_linear(torch.randn(130, 128, generator=torch.Generator().manual_seed(3)), mode)
    exact = layer.dequantize(torch.float32)
    found = Products([lay(layer, dtype)])(torch.eye(128))[0].T
    if mode == "nf4" and dtype == torch.bfloat16:
        # Rounded to 8 bits: at most half of the last one off.
        torch.testing.assert_close(found, exact, rtol=2**-8, atol=0)
    else:
        assert found.equal(exact)


@pytest.mark.parametrize("mode", [None, "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [257, 320])
def test_no_row_changes_a_bit_of_another(mode, dtype, width):
    """Rows alone, whose weights become numbers in registers, and many, whose weights do in memory."""
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(130, width, generator=generator), torch.randn(100, width, generator=generator)
    products = Products([lay(quantize_linear(weight, mode) if mode else weight, dtype)])
    together = products(x)[0]
    for rows in (1, 2, 3, 5, 6, 7, 13):
        assert torch.cat([products(part)[0] for part in x.split(rows)]).equal(together)


def test_other_devices_and_precisions_go_by_the_models_forward():
    dimensions = make_dimensions("x070", 1, 32, 8, 256)
    assert isinstance(serve(build_model(random_weights(dimensions), dimensions, torch.float64)), Forward)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    """The tests of this file's products by the kernels for lesser processors, in a process of its own."""
    root = Path(__file__).parents[2]
    names = ["test_products_against_float64", "test_quantized_weights", "test_no_"]
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("runs inside of itself")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__)), "-k", " or ".join(names)], cwd=root,
                          env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "100%" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("version", ["x060", "x070"])
@torch.inference_mode()
def test_one_token_each(version):
    """What a CUDA graph captures, which has no borders, is the forward."""
    model = models(version, 64, 16, torch.float32, None)[0]
    _, state = model(TOKENS, BORDERS)
    tokens, moved = torch.tensor([3, 1, 4, 1]), state.clone()
    expected, after = model(tokens, torch.arange(5, dtype=torch.int32), state)
    hidden = Forward(model).advance_each(tokens, moved)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    for part in ("att_shift", "wkv", "ffn_shift"):
        torch.testing.assert_close(getattr(moved, part), getattr(after, part), rtol=1e-5, atol=1e-5)
