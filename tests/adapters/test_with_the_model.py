"""Profiles on the real RWKV-6 and RWKV-7: nothing changes at the start, what trains is what is promised, and merging is exact."""

import pytest
import torch

from src.adapters.apply import apply_layer_profile, parameter_groups, quantized_linears
from src.adapters.files import load_adapter, merge_adapter, save_adapter
from src.checkpoint.dimensions import Dimensions
from src.checkpoint.io import fingerprint
from src.model import build_model
from tests.adapters.tiny import profile
from tests.random_checkpoint import make_dimensions, random_weights

RANKS = {"x060": {"decay": 4, "mix": 3}, "x070": {"w": 4, "a": 4, "v": 3, "g": 6}}
LINEARS = {"x060": {"att": {"receptance", "key", "value", "output", "gate"}, "ffn": {"key", "receptance", "value"}},
           "x070": {"att": {"receptance", "key", "value", "output"}, "ffn": {"key", "value"}}}
TOKENS = torch.arange(40) * 7 % 29


def random_checkpoint(version: str) -> tuple[dict[str, torch.Tensor], Dimensions]:
    dimensions = make_dimensions(version, n_layer=2, n_embd=32, head_size=8, vocab_size=29, n_ffn=48, ranks=RANKS[version])
    return random_weights(dimensions), dimensions


def logits(model) -> torch.Tensor:
    hidden, _ = model(TOKENS, torch.tensor([0, 17, 40], dtype=torch.int32))
    return model.logits(hidden)


def adapted(weights, dimensions, settings, dtype=torch.float32, quantize=None, step: float = 0.0, seed: int = 0):
    """The model as a run has it; with `step`, what trains moved by so much noise."""
    model = build_model(weights, dimensions, dtype, quantize=quantize, hold=quantized_linears(settings, quantize))
    apply_layer_profile(model, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += step * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_the_adapted_model_starts_as_the_base(version, dtype, quantize):
    weights, dimensions = random_checkpoint(version)
    for modes in [("freeze", "lora", "lora", "lora"), ("full", "full", "lora", "full")]:
        settings = profile(*modes, dropout=0.2)
        base = build_model(weights, dimensions, dtype, quantize=quantize, hold=quantized_linears(settings, quantize))
        assert torch.equal(logits(adapted(weights, dimensions, settings, dtype, quantize).train()), logits(base))


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_merged_checkpoint_gives_the_adapter_models_logits(version, tmp_path):
    weights, dimensions = random_checkpoint(version)
    for modes in [("freeze", "lora", "lora", "lora"), ("full", "full", "lora", "full")]:
        settings = profile(*modes)
        model = adapted(weights, dimensions, settings, step=0.05)
        path = tmp_path / "adapter.safetensors"
        save_adapter(model, path, settings, fingerprint(weights), {})
        expected = logits(model)
        merged = logits(build_model(merge_adapter(weights, path), dimensions))
        # float32 through two layers, the LoRA added to the weight instead of to the output.
        assert (merged - expected).norm() < 1e-5 * expected.norm()
        assert (logits(build_model(weights, dimensions)) - expected).norm() > 1e-2 * expected.norm()
        again = adapted(weights, dimensions, settings, step=0.05, seed=1)
        load_adapter(again, path, fingerprint(weights))
        assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_adapter_and_every_parameter_of_a_full_layer_gets_a_gradient(version, quantize):
    weights, dimensions = random_checkpoint(version)
    settings = profile("full", "full", "lora", "full")
    model = adapted(weights, dimensions, settings, quantize=quantize, step=0.01)
    torch.nn.functional.cross_entropy(logits(model), TOKENS.flip(0)).backward()
    linears = {f"blocks.1.{part}.{name}" for part, names in LINEARS[version].items() for name in names}
    loras = {f"{name}.{leaf}" for name in linears for leaf in ("lora_A", "lora_B")}
    expected = {name for name in weights if not name.startswith("blocks.1.")} | loras
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.dtype == torch.float32}
    assert with_gradient == expected
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)

    decayed = {name for group in parameter_groups(model, settings) if group["weight_decay"] for name in group["names"]}
    full = {f"blocks.0.{part}.{name}.weight" for part, names in LINEARS[version].items() for name in names}
    assert decayed == {"emb.weight", "head.weight"} | full | loras
