"""RWKV-7 "Goose" (arXiv:2503.14456; BlinkDL/RWKV-LM, RWKV-v7): parameter names and shapes of the official releases.

    S_t = S_{t-1} diag(w_t) - (S_{t-1} kappa_t)(kappa_t * a_t)^T + v_t k_t^T,   y_t = S_t r_t
    x = x + time_mixing(ln1(x));   x = x + channel_mixing(ln2(x))

Purely token ids in, hidden vectors out: knows nothing about text, preferences, or which layers train.
Sequences are packed end to end; rwkv6.py has the same structure for v6.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.linear import Linear, Product, apply
from src.checkpoint.dimensions import Dimensions
from src.model.layers import Packing, head_norm, layer_norm, like, matrix, mix_tokens, recur, relu_square, token_shift, vector
from src.wkv import wkv7, wkv7_step

# The official constant, not a function of the head size.
HEAD_NORM_EPS = 64e-5


class TimeMixing(nn.Module):
    time_state: nn.Parameter | None

    def __init__(self, dimensions: Dimensions, layer: int):
        super().__init__()
        width, n_head = dimensions.n_embd, dimensions.n_head
        self.n_head = n_head
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(width) for _ in range(6))
        self.w0, self.w1, self.w2 = vector(width), matrix(width, dimensions.rank("w")), matrix(dimensions.rank("w"), width)
        self.a0, self.a1, self.a2 = vector(width), matrix(width, dimensions.rank("a")), matrix(dimensions.rank("a"), width)
        if layer > 0:
            self.v0, self.v1, self.v2 = vector(width), matrix(width, dimensions.rank("v")), matrix(dimensions.rank("v"), width)
        self.g1, self.g2 = matrix(width, dimensions.rank("g")), matrix(dimensions.rank("g"), width)
        self.k_k, self.k_a, self.r_k = vector(width), vector(width), matrix(n_head, dimensions.head_size)
        self.receptance, self.key, self.value, self.output = (Linear(width, width) for _ in range(4))
        self.ln_x = nn.GroupNorm(n_head, width, eps=HEAD_NORM_EPS)
        self.register_parameter("time_state", None)  # the state before the first token, if state tuning adds one

    def forward(self, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None, packing: Packing | None,
                product: Product) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T_total, D], shift [R, D], wkv [R, H, N, N], v_first [T_total, D] of block 0 -> the same four, advanced."""
        previous, shift = token_shift(x, shift, packing)
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x_r, x_w, x_k, x_v, x_a, x_g = mix_tokens(x, previous, mixes)

        r, k, v = product(self.receptance, x_r), product(self.key, x_k), product(self.value, x_v)
        decay = like(self.w0, x) + torch.tanh(x_w @ like(self.w1, x)) @ like(self.w2, x)
        log_w = -math.exp(-0.5) * torch.sigmoid(decay.float() if x.dtype != torch.float64 else decay)
        a = torch.sigmoid(like(self.a0, x) + (x_a @ like(self.a1, x)) @ like(self.a2, x))
        g = torch.sigmoid(x_g @ like(self.g1, x)) @ like(self.g2, x)
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(like(self.v0, x) + (x_v @ like(self.v1, x)) @ like(self.v2, x))

        kappa = F.normalize(self._heads(k * like(self.k_k, x)), dim=-1)
        k = k * (1 + (a - 1) * like(self.k_a, x))
        r, k, v = self._heads(r), self._heads(k), self._heads(v)
        y, wkv = recur(wkv7, wkv7_step, (r, self._heads(log_w), k, v, kappa, self._heads(a)), wkv, packing)
        y = head_norm(y, self.ln_x) + ((r * k * like(self.r_k, x)).sum(-1, keepdim=True) * v).flatten(1)
        return product(self.output, y * g), shift, wkv, v_first

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1))


class ChannelMixing(nn.Module):
    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.x_k = vector(dimensions.n_embd)
        self.key = Linear(dimensions.n_embd, dimensions.n_ffn)
        self.value = Linear(dimensions.n_ffn, dimensions.n_embd)

    def forward(self, x: Tensor, shift: Tensor, packing: Packing | None, product: Product) -> tuple[Tensor, Tensor]:
        """x [T_total, D], shift [R, D] -> the same two, advanced."""
        previous, shift = token_shift(x, shift, packing)
        (x_k,) = mix_tokens(x, previous, (self.x_k,))
        return product(self.value, relu_square(product(self.key, x_k))), shift


class Block(nn.Module):
    def __init__(self, dimensions: Dimensions, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(dimensions.n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(dimensions.n_embd), nn.LayerNorm(dimensions.n_embd)
        self.att, self.ffn = TimeMixing(dimensions, layer), ChannelMixing(dimensions)

    def forward(self, x: Tensor, v_first: Tensor | None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor,
                packing: Packing | None, dtype: torch.dtype,
                product: Product = apply) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [T_total, D] at the residual's precision, computed in `dtype`; the rest as in TimeMixing and ChannelMixing."""
        y, att_shift, wkv, v_first = self.att(layer_norm(x, self.ln1, dtype), att_shift, wkv, v_first, packing, product)
        x = x + y
        y, ffn_shift = self.ffn(layer_norm(x, self.ln2, dtype), ffn_shift, packing, product)
        return x + y, v_first, att_shift, wkv, ffn_shift
