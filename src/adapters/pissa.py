"""PiSSA (Meng et al. 2024, arXiv:2404.02948): trains a weight's principal part; the residual stays frozen.

W = U S V^T. Its r largest singular values give B = U sqrt(S) [out, r] and A = sqrt(S) V^T [r, in], found by a fast randomized SVD
(Halko et al. 2009, arXiv:0909.4061) that is the same at every call. With A0 and B0 these starts, y = (W - B0 A0) x + B A x, which
is W x at the start. What trains: `lora_A` and `lora_B`. The file keeps `start_A` and `start_B` too, so that it merges into the
base itself: W + B A - B0 A0.

Over a plain weight the frozen part is computed as W x - B0 A0 x, without the rounding that a residual stored in bfloat16 would
have. Over a quantized weight the residual is quantized (the paper's QPiSSA), which gives a smaller error than quantizing W. The
model at the start then differs from the plainly quantized one, and references must come from it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import Linear
from src.quantization.linear import QuantizedLinear, quantize_linear

# Vectors beyond the rank, and rounds of the randomized SVD. A 1024 x 1024 weight's 16 largest singular values are accurate
# within 3e-6 where they fall like 1/sqrt(i), and within 2e-2 for noise, which has the flattest spectrum.
OVERSAMPLING, ROUNDS = 16, 8


class PiSSALinear(AdaptedLinear):
    """A linear layer with `lora_A` [rank, in] and `lora_B` [out, rank] and their frozen starts `start_A` and `start_B`.

    Alpha and dropout are not used: the product is not scaled, and dropout would drop part of W itself.

    Raises:
        ValueError: the base is already quantized; use `quantized` for that.
    """

    keeps = ("start_A", "start_B")
    splits_base = True
    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: Linear | QuantizedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        if isinstance(base, QuantizedLinear):
            raise ValueError("PiSSA splits a weight before it is quantized: build the model with `quantized_linears`")
        self._add(base, *principal_part(base.weight.detach(), rank))

    @classmethod
    def quantized(cls, weight: Tensor, scheme: str, rank: int) -> "PiSSALinear":
        """The whole adapted layer, over the quantized residual; nothing trains yet."""
        start_A, start_B = principal_part(weight, rank)
        layer = cls.__new__(cls)
        layer._add(quantize_linear(weight.float() - start_B @ start_A, scheme), start_A, start_B)
        return layer.requires_grad_(False)

    def _add(self, base: Linear | QuantizedLinear, start_A: Tensor, start_B: Tensor) -> None:
        self._hold(base)
        self.lora_A, self.lora_B = nn.Parameter(start_A.clone()), nn.Parameter(start_B.clone())
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)

    @staticmethod
    def shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        down, up = (rank, in_features), (out_features, rank)
        return {"lora_A": down, "lora_B": up, "start_A": down, "start_B": up}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], alpha: float) -> Tensor:
        lora_A, lora_B, start_A, start_B = (tensors[name].float() for name in ("lora_A", "lora_B", "start_A", "start_B"))
        return (weight.float() + (lora_B @ lora_A - start_B @ start_A)).to(weight.dtype)

    @property
    def up(self) -> Tensor:
        return self.lora_B if self.quantized_base else torch.cat((self.lora_B, -self.start_B), 1)

    def down(self, x: Tensor) -> Tensor:
        down = self.lora_A if self.quantized_base else torch.cat((self.lora_A, self.start_A))
        return F.linear(x, down.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}"


@torch.no_grad()
def principal_part(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in float32; B A is nearly the best approximation of that rank to weight [out, in]."""
    tall = weight.float() if weight.shape[0] >= weight.shape[1] else weight.float().T
    basis = _range(tall, min(rank + OVERSAMPLING, *weight.shape))
    u, s, vh = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    root = s[:rank].sqrt()
    long, short = (basis @ u[:, :rank]) * root, vh[:rank].T * root  # tall ~ long short^T
    up, down = (long, short) if tall.shape == weight.shape else (short, long)
    # DeepSpeed sends parameters between processes in their memory layout.
    return down.T.contiguous(), up.contiguous()


def _range(matrix: Tensor, columns: int) -> Tensor:
    """Orthonormal columns [out, columns] that approximately span the range of `matrix` [out, in] (Halko et al., algorithm 4.4).

    The random start is drawn on the CPU, so that references and training split a weight alike on any device.
    """
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis
