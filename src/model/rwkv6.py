"""RWKV-6 "Finch" (arXiv:2404.05892; BlinkDL/RWKV-LM, RWKV-v5/v6): parameter names and shapes of the official releases.

    y_t = r_t^T (S_{t-1} + (u * k_t) v_t^T),   S_t = diag(w_t) S_{t-1} + k_t v_t^T,   w_t = exp(-exp(d_t))
    x = x + time_mixing(ln1(x));   x = x + channel_mixing(ln2(x))

Purely token ids in, hidden vectors out: knows nothing about text, preferences, or which layers train.
Sequences are packed end to end; rwkv7.py has the same structure for v7.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.linear import Linear, Product, apply
from src.checkpoint.dimensions import Dimensions
from src.model.layers import Packing, head_norm, layer_norm, like, matrix, mix_tokens, recur, relu_square, token_shift, vector
from src.wkv import wkv6, wkv6_step

# The official constant (1e-5 * 8^2), not a function of the head size.
HEAD_NORM_EPS = 64e-5


class TimeMixing(nn.Module):
    time_state: nn.Parameter | None

    def __init__(self, dimensions: Dimensions):
        super().__init__()
        width, n_head = dimensions.n_embd, dimensions.n_head
        self.n_head = n_head
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(width), vector(width), vector(width)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(width), vector(width), vector(width)
        self.time_maa_w1, self.time_maa_w2 = matrix(width, 5 * dimensions.rank("mix")), matrix(5, dimensions.rank("mix"), width)
        self.time_decay = vector(width)
        self.time_decay_w1, self.time_decay_w2 = matrix(width, dimensions.rank("decay")), matrix(dimensions.rank("decay"), width)
        self.time_faaaa = matrix(n_head, dimensions.head_size)
        self.receptance, self.key, self.value, self.output, self.gate = (Linear(width, width) for _ in range(5))
        self.ln_x = nn.GroupNorm(n_head, width, eps=HEAD_NORM_EPS)
        self.register_parameter("time_state", None)  # the state before the first token, if state tuning adds one

    def forward(self, x: Tensor, shift: Tensor, wkv: Tensor, packing: Packing | None,
                product: Product) -> tuple[Tensor, Tensor, Tensor]:
        """x [T_total, D], shift [R, D], wkv [R, H, N, N] -> the same three, advanced."""
        previous, shift = token_shift(x, shift, packing)
        (x_x,) = mix_tokens(x, previous, (self.time_maa_x,))
        mixed = torch.tanh(x_x @ like(self.time_maa_w1, x)).unflatten(-1, (5, -1)).transpose(0, 1)
        mixes = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        moved = torch.baddbmm(torch.stack([like(mix, x) for mix in mixes])[:, None], mixed, self.time_maa_w2.to(x.dtype))
        x_w, x_k, x_v, x_r, x_g = mix_tokens(x, previous, moved.unbind(0))

        r, k, v = product(self.receptance, x_r), product(self.key, x_k), product(self.value, x_v)
        r, k, v, g = self._heads(r), self._heads(k), self._heads(v), F.silu(product(self.gate, x_g))
        decay = like(self.time_decay, x) + torch.tanh(x_w @ like(self.time_decay_w1, x)) @ like(self.time_decay_w2, x)
        log_w = -torch.exp(decay.float() if x.dtype != torch.float64 else decay)
        whole, step = partial(wkv6, u=self.time_faaaa), partial(wkv6_step, u=self.time_faaaa)
        y, wkv = recur(whole, step, (r, self._heads(log_w), k, v), wkv, packing)
        return product(self.output, head_norm(y, self.ln_x) * g), shift, wkv

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1))


class ChannelMixing(nn.Module):
    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.time_maa_k, self.time_maa_r = vector(dimensions.n_embd), vector(dimensions.n_embd)
        self.key = Linear(dimensions.n_embd, dimensions.n_ffn)
        self.receptance = Linear(dimensions.n_embd, dimensions.n_embd)
        self.value = Linear(dimensions.n_ffn, dimensions.n_embd)

    def forward(self, x: Tensor, shift: Tensor, packing: Packing | None, product: Product) -> tuple[Tensor, Tensor]:
        """x [T_total, D], shift [R, D] -> the same two, advanced."""
        previous, shift = token_shift(x, shift, packing)
        x_k, x_r = mix_tokens(x, previous, (self.time_maa_k, self.time_maa_r))
        return torch.sigmoid(product(self.receptance, x_r)) * product(self.value, relu_square(product(self.key, x_k))), shift


class Block(nn.Module):
    def __init__(self, dimensions: Dimensions, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(dimensions.n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(dimensions.n_embd), nn.LayerNorm(dimensions.n_embd)
        self.att, self.ffn = TimeMixing(dimensions), ChannelMixing(dimensions)

    def forward(self, x: Tensor, v_first: None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor,
                packing: Packing | None, dtype: torch.dtype,
                product: Product = apply) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        """x [T_total, D] at the residual's precision, computed in `dtype`; v_first is v7's and passes through."""
        y, att_shift, wkv = self.att(layer_norm(x, self.ln1, dtype), att_shift, wkv, packing, product)
        x = x + y
        y, ffn_shift = self.ffn(layer_norm(x, self.ln2, dtype), ffn_shift, packing, product)
        return x + y, v_first, att_shift, wkv, ffn_shift
