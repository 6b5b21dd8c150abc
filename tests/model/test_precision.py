"""Half precision stays near float32, wide residuals do not overflow, and quantized models are the dequantized ones."""

import pytest
import torch

from src.adapters.linear import Linear
from src.checkpoint.io import load_checkpoint
from src.errors import NotFinite
from src.model import build_model
from src.quantization.linear import QuantizedLinear, quantize_linear
from tests.random_checkpoint import random_weights
from tests.tiny import VERSIONS, tiny_dimensions, tiny_text

TOKENS = torch.tensor(tiny_text("What colour is the sky?", "It is blue.") + tiny_text("2 plus 3?", "5."))
BOUNDS = torch.tensor([0, 40, 60, len(TOKENS)], dtype=torch.int32)
HEAD_SIZE = 16


def logits(model) -> torch.Tensor:
    return model.logits(model(TOKENS, BOUNDS)[0])


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


# One rounding is 2^-9 = 2e-3 of a bfloat16 and 2^-12 = 2e-4 of a float16; two blocks gather some ten of them.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_every_precision_is_near_float64(version, kind, dtype, tolerance, tiny_checkpoints):
    weights, dimensions = load_checkpoint(tiny_checkpoints(version, kind, HEAD_SIZE)), tiny_dimensions(version, HEAD_SIZE)
    model = build_model(weights, dimensions, dtype)
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in model.parameters())
    hidden, state = model(TOKENS, BOUNDS)
    assert hidden.dtype == dtype and model.logits(hidden).dtype == torch.float32
    assert {x.dtype for x in state.wkv} == {torch.float32} and {x.dtype for x in state.att_shift + state.ffn_shift} == {dtype}
    assert relative(model.logits(hidden), logits(build_model(weights, dimensions, torch.float64))) < tolerance


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_fp16_holds_a_residual_beyond_its_range(version):
    dimensions = tiny_dimensions(version, HEAD_SIZE)
    weights = random_weights(dimensions)
    # Normed embeddings reach 3, so this residual starts beyond 65504, where fp16 ends; the weight itself is within.
    weights["blocks.0.ln0.weight"] *= 4e4
    model, residual = build_model(weights, dimensions), []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: residual.append(inputs[0].abs().max()))
    truth = logits(model)
    assert residual[0] > 65504
    assert relative(logits(build_model(weights, dimensions, torch.float16)), truth) < 5e-3


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(version, mode):
    dimensions = tiny_dimensions(version, HEAD_SIZE)
    weights = random_weights(dimensions)
    plain = build_model(weights, dimensions)
    for blocks in (None, {1}, set()):
        def hold(name, weight, blocks=blocks):
            return quantize_linear(weight, mode) if int(name.split(".")[1]) in blocks else None

        model = build_model(weights, dimensions, quantize=mode, hold=hold if blocks is not None else None)
        linears = {name for name, module in plain.named_modules() if isinstance(module, Linear) and name.startswith("blocks.")}
        expected = {name for name in linears if blocks is None or int(name.split(".")[1]) in blocks}
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        assert quantized.keys() == expected
        rounded = weights | {f"{name}.weight": module.dequantize(torch.float32) for name, module in quantized.items()}
        assert relative(logits(model), logits(build_model(rounded, dimensions))) < 2e-6
        # int8 is within 1/254 of a row's largest weight; NF4's 16 levels leave errors of some tenth of a weight.
        error = relative(logits(model), logits(plain))
        assert 0 < error < {"int8": 0.05, "nf4": 0.6}[mode] if expected else error == 0


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 7e4), (torch.float16, -1e30), (torch.bfloat16, 3.4e38)])
@pytest.mark.parametrize("name", ["emb.weight", "head.weight", "blocks.1.att.key.weight", "ln_out.bias"])
def test_a_weight_beyond_the_precision_s_numbers_is_refused(name, dtype, value):
    weights, dimensions = random_weights(tiny_dimensions("x070", HEAD_SIZE)), tiny_dimensions("x070", HEAD_SIZE)
    weights[name].view(-1)[3] = value
    build_model(weights, dimensions)
    said = rf"^the checkpoint's {name} \(1 of {weights[name].numel()} values\) are beyond the range"
    with pytest.raises(NotFinite, match=said):
        build_model(weights, dimensions, dtype)
