"""Weights laid out for CPU products that read each of them once, in order (the layouts: cpu/decode_kernels.h).

The weights are those of the training's forward to the last bit, except quantized ones in a bfloat16 model: the forward scales
them and rounds to bfloat16. Here codes are summed unscaled and the sums are scaled. int8's codes are exact in bfloat16; NF4's 16
values are rounded where the processor multiplies two at once, an error of 0.11 %, against 0.17 % for rounding scaled weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.adapters.linear import Linear
from src.quantization.linear import QuantizedLinear

PANEL = 64  # outputs
FLOAT32, BFLOAT16, FLOAT16, INT8, NF4 = range(5)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
INPUT_IN_BFLOAT16 = 16  # added to a kind
IDENTITY, TANH, SIGMOID, RELU_SQUARE = range(4)


class Panels(NamedTuple):
    """One weight [out, in]."""

    data: Tensor
    scales: Tensor  # empty if there are none
    into: int
    out: int
    kind: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


class Products:
    """Products of several inputs, each with its own weight, in one call: `activation(x W^T)` for each, float32."""

    def __init__(self, weights: Sequence[Panels], activations: Sequence[int] = ()):
        self.nbytes = sum(weight.nbytes for weight in weights)
        columns = map(list, zip(*weights, strict=True))
        self.prepared = torch.classes.rwkv_wkv.Weights(*columns, list(activations) or [IDENTITY] * len(weights))

    def __call__(self, *x: Tensor) -> list[Tensor]:
        """x, each [T, in] -> [T, out] for each."""
        return self.prepared.multiply(x, None, None)


def lay(weight: Tensor | Linear | QuantizedLinear, dtype: torch.dtype) -> Panels:
    """Lay out a weight [out, in] of a model that computes in `dtype`."""
    rounds = INPUT_IN_BFLOAT16 if dtype == torch.bfloat16 else 0
    if isinstance(weight, QuantizedLinear):
        size = weight.in_features, weight.out_features
        if weight.mode == "int8":
            codes = F.pad(weight.codes, (0, weight.in_features % 2))
            return Panels(_lay(codes).contiguous(), _lay(weight.scales).flatten(1).contiguous(), *size, INT8 + rounds)
        if weight.mode == "nf4" and weight.in_features % PANEL == 0:
            return Panels(_lay_nf4(weight), _lay(weight.scales.view(weight.out_features, -1)).contiguous(), *size,
                          NF4 + rounds)
        weight = weight.dequantize(dtype)
    elif isinstance(weight, Linear):
        weight = weight.weight
    weight = weight.detach().to(dtype)
    laid = _lay(weight if dtype == torch.float32 else F.pad(weight, (0, weight.shape[1] % 2)))
    if dtype != torch.float32:
        laid = laid.unflatten(1, (-1, 2)).transpose(2, 3)
    return Panels(laid.contiguous(), weight.new_empty(0), weight.shape[1], weight.shape[0], KINDS[dtype] + rounds)


def _lay(weight: Tensor) -> Tensor:
    """[out, in] -> [panels, in, 64]."""
    return F.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2)


def _lay_nf4(weight: QuantizedLinear) -> Tensor:
    """Codes in bitsandbytes' order, the earlier of two in the high half -> [panels, in / 8, 64, 4]."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).view(weight.out_features, weight.in_features)
    i0, i1, i2, i3, i4, i5, i6, i7 = _lay(codes).unflatten(1, (-1, 8)).unbind(2)
    return torch.stack((i0 | i2 << 4, i4 | i6 << 4, i1 | i3 << 4, i5 | i7 << 4), dim=-1)
