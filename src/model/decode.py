"""A model that only goes forward, token after token, its state changed in place: what writing text needs.

`serve` chooses how, here and nowhere else. On the CPU, where a compiler is found, kernels of our own (cuda/product_cpu.h,
cuda/decode_cpu.h) compute in float32 from weights held at the model's precision, and every number of a sequence in an order that
does not depend on the sequences beside it, nor on where its tokens were cut: so a sequence's logits are the same to the last bit
in every batch. Elsewhere the model's own forward serves, in whose products another batch's shape changes the last bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checkpoint.dimensions import Dimensions
from src.model import rwkv6, rwkv7
from src.model.layers import Packing, read_packing
from src.model.panels import IDENTITY, RELU_SQUARE, SIGMOID, TANH, Products, lay
from src.model.rwkv import RWKV
from src.model.state import State
from src.wkv import native


class Forward:
    """The model's own forward, made to change its state in place; where no kernels serve, and on a GPU."""

    def __init__(self, model: RWKV, captures: bool = False):
        """captures: whether steps may be captured as CUDA graphs."""
        self.model, self.dimensions, self.device, self.captures = model, model.dimensions, model.device, captures
        # Steps that wait in the device's queue while the host looks at an earlier one.
        self.ahead = 2 if self.device.type == "cuda" else 0
        self._packings: dict[int, Packing] = {}

    @torch.no_grad()
    def fresh(self, n_sequences: int) -> State:
        """The states of so many sequences before any token, each in memory of its own."""
        return self.model.initial_state(n_sequences).clone()

    def advance(self, tokens: Tensor, cu_seqlens: Tensor, state: State) -> Tensor:
        """Read tokens [T_total] of S packed sequences, none of them empty, each from its state on, which moves on in place.

        Returns the hidden vectors after each sequence's last token, [S, n_embd].
        """
        hidden, after = self.model(tokens, cu_seqlens, state)
        state.copy_(after)
        return hidden[(cu_seqlens[1:].to(torch.int64) - 1).to(hidden.device, non_blocking=True)]

    def advance_each(self, tokens: Tensor, state: State) -> Tensor:
        """`advance` by one token [S] a sequence, without looking at a value on the host."""
        n = len(tokens)
        if n not in self._packings:
            # A graph's copy of the borders reads them where they lie, again at each replay.
            borders = torch.arange(n + 1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            self._packings[n] = read_packing(borders, None, self.device)
        hidden, after = self.model.forward_packed(tokens, self._packings[n], state)
        state.copy_(after)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, n_embd] -> float32 [S, vocab_size] (float64 in a float64 model)."""
        return self.model.logits(hidden)


class Kernels:
    """The same by the CPU's kernels, for a base model as it is built: its weights are laid out anew, and it is taken apart."""

    ahead, captures = 0, False  # as in Forward

    def __init__(self, model: RWKV):
        self.dimensions, self.device = model.dimensions, model.device
        dtype, block = model.dtype, {"x060": _Block6, "x070": _Block7}[model.dimensions.version]
        self._embedding, self._norm_in, self._norm_out = model.emb.weight, _floats(model.blocks[0].ln0), _floats(model.ln_out)
        self._blocks = []
        for layer in range(self.dimensions.n_layer):
            self._blocks.append(block(model.blocks[layer], dtype, self.dimensions))
            model.blocks[layer] = nn.Identity()
        self._head = Products([lay(model.head, dtype)])
        model.head = nn.Identity()
        self.nbytes = self._head.nbytes + sum(part.nbytes for block in self._blocks for part in vars(block).values()
                                              if isinstance(part, Products))

    def fresh(self, n_sequences: int) -> State:
        return State.zeros(self.dimensions, n_sequences, torch.float32)

    def advance(self, tokens: Tensor, cu_seqlens: Tensor, state: State) -> Tensor:
        """As `Forward.advance`; hidden is float32."""
        x = self._layer_norm(F.embedding(tokens, self._embedding).float(), self._norm_in)
        v_first = None
        for block, *layer in zip(self._blocks, state.att_shift, state.wkv, state.ffn_shift, strict=True):
            v_first = block(x, v_first, *layer, cu_seqlens)
        last = x if len(cu_seqlens) == len(x) + 1 else x[cu_seqlens[1:].long() - 1]
        return self._layer_norm(last, self._norm_out)

    def advance_each(self, tokens: Tensor, state: State) -> Tensor:
        return self.advance(tokens, torch.arange(len(tokens) + 1, dtype=torch.int32), state)

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, n_embd] -> float32 [S, vocab_size]."""
        return self._head(hidden)[0]

    def _layer_norm(self, x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm)


def serve(model: RWKV) -> Forward | Kernels:
    """How to write text with this model here; a model given to kernels is taken apart."""
    if model.device.type == "cuda":
        # Without the kernels the recurrence looks at borders on the host.
        return Forward(model, captures=native.missing("cuda") is None)
    by_kernels = (model.device.type == "cpu" and model.dtype != torch.float64 and native.serves(torch.empty(
        0, model.dimensions.n_head, model.dimensions.head_size)))
    return Kernels(model) if by_kernels else Forward(model)


class _Block7:
    """A block of RWKV-7; the formulas are those of rwkv7.py."""

    def __init__(self, block: nn.Module, dtype: torch.dtype, dimensions: Dimensions):
        att, ffn = block.att, block.ffn
        mixes_values = hasattr(att, "v0")
        pairs = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)] + ([(att.v1, att.v2)] if mixes_values else [])
        self.norms = _floats(block.ln1), _floats(block.ln2)
        self.att_mixes = _rows(att.x_r, att.x_k, att.x_v, att.x_w, att.x_a, att.x_g)
        self.ffn_mixes = _rows(ffn.x_k)
        self.wide = Products([lay(x, dtype) for x in (att.receptance, att.key, att.value, *(w1.T for w1, _ in pairs))],
                             [IDENTITY, IDENTITY, IDENTITY, TANH, IDENTITY, SIGMOID, IDENTITY][:3 + len(pairs)])
        self.narrow = Products([lay(w2.T, dtype) for _, w2 in pairs])
        vectors = (att.w0, att.a0, att.v0 if mixes_values else att.a0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias)
        self.vectors = [x.detach().float().flatten().contiguous() for x in vectors]
        self.output = Products([lay(att.output, dtype)])
        self.key, self.value = Products([lay(ffn.key, dtype)], [RELU_SQUARE]), Products([lay(ffn.value, dtype)])

    def __call__(self, x: Tensor, v_first: Tensor | None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor,
                 cu_seqlens: Tensor) -> Tensor:
        """x [T_total, D] and the state move on in place; v_first of block 0 is returned."""
        ops = torch.ops.rwkv_wkv
        x_r, x_k, x_v, x_w, x_a, x_g = ops.decode_norm_mix(x, *self.norms[0], att_shift, cu_seqlens, self.att_mixes)[2].unbind(0)
        inputs = (x_r, x_k, x_v, x_w, x_a, x_g) if v_first is None else (x_r, x_k, x_v, x_w, x_a, x_g, x_v)
        r, k, v, *narrow = self.wide(*inputs)
        w, a, g, *v_gate = self.narrow(*narrow)
        y = ops.decode_advance7(r, k, v, w, a, *(v_gate or (None,)), g, v_first, self.vectors, rwkv7.HEAD_NORM_EPS, wkv,
                                cu_seqlens)
        self.output.add_to(x, y)
        mixed = ops.decode_norm_mix(x, *self.norms[1], ffn_shift, cu_seqlens, self.ffn_mixes)[2]
        self.value.add_to(x, *self.key(mixed[0]))
        return v if v_first is None else v_first


class _Block6:
    """A block of RWKV-6; the formulas are those of rwkv6.py."""

    def __init__(self, block: nn.Module, dtype: torch.dtype, dimensions: Dimensions):
        att, ffn, rank = block.att, block.ffn, dimensions.rank("mix")
        self.norms = _floats(block.ln1), _floats(block.ln2)
        self.first_mix = _rows(att.time_maa_x)
        self.att_mixes = _rows(att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)
        self.ffn_mixes = _rows(ffn.time_maa_k, ffn.time_maa_r)
        self.mix_in = Products([lay(w1.T, dtype) for w1 in att.time_maa_w1.split(rank, dim=1)], [TANH] * 5)
        self.mix_out = Products([lay(w2.T, dtype) for w2 in att.time_maa_w2.unbind(0)])
        self.wide = Products([lay(x, dtype) for x in (att.time_decay_w1.T, att.key, att.value, att.receptance, att.gate)],
                             [TANH, IDENTITY, IDENTITY, IDENTITY, IDENTITY])
        self.decay = Products([lay(att.time_decay_w2.T, dtype)])
        vectors = (att.time_decay, att.time_faaaa, att.ln_x.weight, att.ln_x.bias)
        self.vectors = [x.detach().float().flatten().contiguous() for x in vectors]
        self.output = Products([lay(att.output, dtype)])
        self.up = Products([lay(ffn.key, dtype), lay(ffn.receptance, dtype)], [RELU_SQUARE, SIGMOID])
        self.value = Products([lay(ffn.value, dtype)])

    def __call__(self, x: Tensor, v_first: None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor, cu_seqlens: Tensor) -> None:
        """x [T_total, D] and the state move on in place."""
        ops = torch.ops.rwkv_wkv
        normed, delta, x_x = ops.decode_norm_mix(x, *self.norms[0], att_shift, cu_seqlens, self.first_mix)
        mixed = self.mix_out(*self.mix_in(*[x_x[0]] * 5))
        ops.decode_token_mix(normed, delta, self.att_mixes, mixed)
        w, k, v, r, g = self.wide(*mixed)
        y = ops.decode_advance6(r, k, v, *self.decay(w), g, self.vectors, rwkv6.HEAD_NORM_EPS, wkv, cu_seqlens)
        self.output.add_to(x, y)
        x_k, x_r = ops.decode_norm_mix(x, *self.norms[1], ffn_shift, cu_seqlens, self.ffn_mixes)[2].unbind(0)
        k, r = self.up(x_k, x_r)
        self.value.add_to(x, k, r)


def _floats(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


def _rows(*vectors: Tensor) -> Tensor:
    return torch.stack([vector.detach().float().flatten() for vector in vectors])
