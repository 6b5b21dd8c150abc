"""DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA changes only a weight's direction; its magnitudes are trained separately.

W' = m * V / ||V|| with V = W + (alpha / r) B A (equation 5), A and B as in LoRA, and m = ||W|| at the start, so that training
starts from the base model. For the gradient the norm is a constant (section 4.3). What trains: `lora_A`, `lora_B` and the
magnitudes `lora_M` [out]. Merged: W' itself.

The paper has one magnitude for each column of its W, an input. The authors' code, and peft and torchtune after it, have one for
each output, the norm of a row of `weight` [out, in]; this does the same. RWKV-LM-RLHF has one for each input.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import Linear
from src.adapters.lora import LoRALinear, changed_weight
from src.quantization.linear import QuantizedLinear

# Rows with a smaller norm count as 0: they are divided by this one, and their magnitude begins as this one.
SMALLEST_NORM = 1e-12
ROWS = 4096


class DoRALinear(LoRALinear):
    """A LoRA with `lora_M` [out], all in float32.

    The norms of V's rows are computed from ||W_i||^2, which does not change, and products with A. So a quantized weight is
    dequantized once for the forward, as in LoRA, and never as a whole in float32.
    """

    squares: Tensor  # ||W_i||^2 [out]

    def __init__(self, base: Linear | QuantizedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__(base, rank, alpha, dropout, generator)
        with torch.no_grad():
            exact = torch.float32 if self.quantized_base else torch.promote_types(self.weight.dtype, torch.float32)
            starts = range(0, self.out_features, ROWS)
            rows = (self.rows(start, min(start + ROWS, self.out_features), exact) for start in starts)
            squares = torch.cat([part.square().sum(1) for part in rows])
        self.register_buffer("squares", squares, persistent=False)
        self.lora_M = nn.Parameter(_root(squares))

    @staticmethod
    def shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return LoRALinear.shapes(out_features, in_features, rank) | {"lora_M": (out_features,)}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], alpha: float) -> Tensor:
        changed = changed_weight(weight, tensors, alpha)
        scale = tensors["lora_M"].float() / _root(changed.square().sum(1))
        return (scale[:, None] * changed).to(weight.dtype)

    def forward(self, x: Tensor, base_product: Callable[[AdaptedLinear, Tensor], Tensor] = AdaptedLinear.base_forward) -> Tensor:
        tokens = x.flatten(0, -2)
        # A's rows are multiplied by the frozen weight together with the tokens, since the norm needs A W^T.
        products = base_product(self, torch.cat((tokens, self.lora_A.detach().to(x.dtype))))
        y, across = products.tensor_split((len(tokens),))
        y = torch.addmm(y, self.down(tokens), self.up.to(x.dtype).T)
        return (y * self._factor(across).to(x.dtype)).view(*x.shape[:-1], self.out_features)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._factor(self.base_forward(self.lora_A.detach().to(dtype)))

    def _factor(self, across: Tensor) -> Tensor:
        """m / ||V|| [out] from across = A W^T [r, out]."""
        return self.lora_M / self.norms(across.detach().T)

    @torch.no_grad()
    def norms(self, across: Tensor) -> Tensor:
        """||V_i|| [out] from across = W A^T [out, r]: ||W_i||^2 + 2 s B_i (W A^T)_i + s^2 B_i A A^T B_i^T."""
        step = self.scale * self.lora_B
        gram = self.lora_A @ self.lora_A.T
        return _root(self.squares + (step * (2 * across.to(step.dtype) + step @ gram)).sum(1))


def _root(squares: Tensor) -> Tensor:
    return squares.clamp_min(SMALLEST_NORM**2).sqrt()
