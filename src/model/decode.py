"""A model that only goes forward, token after token, its state changed in place: what writing text needs.

`serve` chooses how, here and nowhere else. On the CPU, where a compiler is found, kernels of our own (cuda/product_cpu.h,
cuda/decode_cpu.h) compute in float32 from weights held at the model's precision, and every number of a sequence in an order that
does not depend on the sequences beside it, nor on where its tokens were cut: so a sequence's logits are the same to the last bit
in every batch. Elsewhere the model's own forward serves, in whose products another batch's shape changes the last bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checkpoint.dimensions import Dimensions
from src.model.panels import IDENTITY, RELU_SQUARE, SIGMOID, TANH, Products, lay
from src.model.rwkv import RWKV
from src.model.state import State
from src.wkv import native


class Forward:
    """The model's own forward, made to change its state in place; where no kernels serve."""

    def __init__(self, model: RWKV):
        self.model, self.dimensions, self.device = model, model.dimensions, model.device

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
        return hidden[(cu_seqlens[1:] - 1).to(hidden.device, torch.int64)]

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, n_embd] -> float32 [S, vocab_size] (float64 in a float64 model)."""
        return self.model.logits(hidden)


class Kernels:
    """The same by the CPU's kernels, for a base model as it is built: its weights are laid out anew, and it is taken apart."""

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
        self.nbytes = self._head.nbytes + sum(block.nbytes for block in self._blocks)

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

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, n_embd] -> float32 [S, vocab_size]."""
        return self._head(hidden)[0]

    def _layer_norm(self, x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm)


def serve(model: RWKV) -> Forward | Kernels:
    """How to write text with this model here; a model given to kernels is taken apart."""
    if model.device.type == "cuda":
        from src.model.cuda_graph import Graphs

        return Graphs(model)
    by_kernels = (model.device.type == "cpu" and model.dtype != torch.float64 and native.serves(torch.empty(
        0, model.dimensions.n_head, model.dimensions.head_size)))
    return Kernels(model) if by_kernels else Forward(model)


class _Block:
    """A layer's weights, as `block6` and `block7` of cuda/bindings_decode.cpp take them."""

    def __init__(self, block: nn.Module, products: Sequence[Products], mixes: Sequence[Tensor], vectors: Sequence[Tensor]):
        self.nbytes = sum(part.nbytes for part in products)
        norms = [x for norm in (block.ln1, block.ln2) for x in _floats(norm)[:2]]
        vectors = [x.detach().float().flatten().contiguous() for x in vectors]
        self.prepared = torch.classes.rwkv_wkv.Block([part.prepared for part in products], [*norms, *mixes, *vectors],
                                                     block.ln1.eps, block.att.ln_x.eps)


class _Block7(_Block):
    def __init__(self, block: nn.Module, dtype: torch.dtype, dimensions: Dimensions):
        att, ffn = block.att, block.ffn
        mixes_values = hasattr(att, "v0")
        pairs = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)] + ([(att.v1, att.v2)] if mixes_values else [])
        wide = Products([lay(x, dtype) for x in (att.receptance, att.key, att.value, *(w1.T for w1, _ in pairs))],
                        [IDENTITY, IDENTITY, IDENTITY, TANH, IDENTITY, SIGMOID, IDENTITY][:3 + len(pairs)])
        narrow = Products([lay(w2.T, dtype) for _, w2 in pairs])
        output, key = Products([lay(att.output, dtype)]), Products([lay(ffn.key, dtype)], [RELU_SQUARE])
        super().__init__(
            block, [wide, narrow, output, key, Products([lay(ffn.value, dtype)])],
            [_rows(att.x_r, att.x_k, att.x_v, att.x_w, att.x_a, att.x_g), _rows(ffn.x_k)],
            [att.w0, att.a0, att.v0 if mixes_values else att.a0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias])

    def __call__(self, x: Tensor, v_first: Tensor | None, *state: Tensor) -> Tensor:
        """x [T_total, D] and the state move on in place; v_first of block 0 is returned."""
        v = torch.ops.rwkv_wkv.decode_block7(self.prepared, x, v_first, *state)
        return v if v_first is None else v_first


class _Block6(_Block):
    def __init__(self, block: nn.Module, dtype: torch.dtype, dimensions: Dimensions):
        att, ffn, rank = block.att, block.ffn, dimensions.rank("mix")
        mix_in = Products([lay(w1.T, dtype) for w1 in att.time_maa_w1.split(rank, dim=1)], [TANH] * 5)
        mix_out = Products([lay(w2.T, dtype) for w2 in att.time_maa_w2.unbind(0)])
        wide = Products([lay(x, dtype) for x in (att.time_decay_w1.T, att.key, att.value, att.receptance, att.gate)],
                        [TANH, IDENTITY, IDENTITY, IDENTITY, IDENTITY])
        decay, output = Products([lay(att.time_decay_w2.T, dtype)]), Products([lay(att.output, dtype)])
        up = Products([lay(ffn.key, dtype), lay(ffn.receptance, dtype)], [RELU_SQUARE, SIGMOID])
        super().__init__(
            block, [mix_in, mix_out, wide, decay, output, up, Products([lay(ffn.value, dtype)])],
            [_rows(att.time_maa_x), _rows(ffn.time_maa_k, ffn.time_maa_r),
             _rows(att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)],
            [att.time_decay, att.time_faaaa, att.ln_x.weight, att.ln_x.bias])

    def __call__(self, x: Tensor, v_first: None, *state: Tensor) -> None:
        """x [T_total, D] and the state move on in place."""
        torch.ops.rwkv_wkv.decode_block6(self.prepared, x, *state)


def _floats(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


def _rows(*vectors: Tensor) -> Tensor:
    return torch.stack([vector.detach().float().flatten() for vector in vectors])
