"""Linear layers with adapters, as the tests of each adapter make them."""

import torch

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import Linear
from src.adapters.modes import ADAPTERS
from src.quantization.linear import QuantizedLinear, quantize_linear

OUT, WIDTH, RANK, ALPHA = 7, 13, 3, 6.0


def plain(out: int = OUT, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Linear:
    layer = Linear(width, out, dtype=dtype)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    layer.weight.requires_grad_(False)
    return layer


def adapted(mode: str, scheme: str | None = None, dtype: torch.dtype = torch.float32, moved: float = 0.0, out: int = OUT,
            width: int = WIDTH, dropout: float = 0.0) -> tuple[AdaptedLinear, Linear | QuantizedLinear]:
    """An adapter over a plain or quantized weight, what trains of it moved by some noise; and that base as it is without one."""
    kind, base = ADAPTERS[mode], plain(out, width, dtype)
    if scheme is None:
        layer = kind(base, RANK, ALPHA, dropout, torch.Generator().manual_seed(1))
    elif kind.splits_base:
        layer, base = kind.quantized(base.weight, scheme, RANK), quantize_linear(base.weight, scheme)
    else:
        base = quantize_linear(base.weight, scheme)
        layer = kind(base, RANK, ALPHA, dropout, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for name in trained(layer):
        parameter = layer.get_parameter(name)
        parameter.data += moved * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(True)
    return layer, base


def trained(layer: AdaptedLinear) -> list[str]:
    return [name for name in layer.shapes(layer.out_features, layer.in_features, RANK) if name not in layer.keeps]


def tensors_of(layer: AdaptedLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


def inputs(width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3)).to(dtype)
