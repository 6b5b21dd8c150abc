"""Decoding: a model that only runs forward, token after token, updating its state in place.

Only `decoder_for` chooses how. On the CPU, if a compiler is found, our own kernels (cpu/product_cpu.h, cpu/decode_cpu.h)
compute in float32 from weights at the model's precision. They compute every number of a sequence in an order that depends neither
on the other sequences nor on where its tokens are cut, so a sequence's logits are the same to the last bit in every batch.
Elsewhere the model's own forward runs, and there the batch's shape changes the last bits of products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checkpoint.dimensions import Dimensions
from src.model import rwkv6, rwkv7
from src.model.layers import ONE_EACH
from src.model.panels import IDENTITY, RELU_SQUARE, SIGMOID, TANH, Products, lay
from src.model.rwkv import RWKV, Block
from src.model.state import State
from src.wkv import native


class Forward:
    """The model's own forward with the state updated in place; used on a GPU, and where there are no kernels."""

    def __init__(self, model: RWKV, captures: bool = False):
        """captures: whether steps may be captured as CUDA graphs."""
        self.model, self.dimensions, self.device, self.captures = model, model.dimensions, model.device, captures
        # Steps in the device's queue while the host reads the result of an earlier one.
        self.ahead = 2 if self.device.type == "cuda" else 0

    @torch.no_grad()
    def fresh(self, n_sequences: int) -> State:
        """The states of `n_sequences` sequences before any token, each in its own memory."""
        return self.model.initial_state(n_sequences).clone()

    def advance(self, tokens: Tensor, cu_seqlens: Tensor, state: State) -> Tensor:
        """Read tokens [T_total] of S packed sequences, none of them empty, from their states, which are updated in place.

        Returns the hidden vectors after each sequence's last token, [S, n_embd].
        """
        hidden, after = self.model(tokens, cu_seqlens, state)
        state.copy_(after)
        return hidden[(cu_seqlens[1:].to(torch.int64) - 1).to(hidden.device, non_blocking=True)]

    def advance_each(self, tokens: Tensor, state: State) -> Tensor:
        """`advance` by one token [S] a sequence, without reading a value on the host."""
        hidden, after = self.model.forward_packed(tokens, ONE_EACH, state)
        state.copy_(after)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, n_embd] -> float32 [S, vocab_size] (float64 in a float64 model)."""
        return self.model.logits(hidden)


class Kernels:
    """The same by the CPU's kernels, for a base model without adapters. It is taken apart: its weights move to another layout."""

    ahead, captures = 0, False  # as in Forward

    def __init__(self, model: RWKV):
        self.dimensions, self.device = model.dimensions, model.device
        self._embedding, self._norm_in, self._norm_out = model.emb.weight, _floats(model.blocks[0].ln0), _floats(model.ln_out)
        self._head = Products([lay(model.head, model.dtype)])
        model.set_submodule("head", nn.Identity())
        self.nbytes = self._head.nbytes
        blocks = []
        for layer in range(self.dimensions.n_layer):
            blocks.append(self._prepare(model.blocks[layer], model.dtype))
            model.set_submodule(f"blocks.{layer}", nn.Identity())
        self._blocks = torch.classes.rwkv_wkv.Blocks(blocks)
        self._advance = {"x060": self._blocks.advance6, "x070": self._blocks.advance7}[self.dimensions.version]

    def _prepare(self, block: Block, dtype: torch.dtype) -> torch.ScriptObject:
        products, mixes, vectors = (_block6(block, dtype, self.dimensions) if isinstance(block, rwkv6.Block)
                                    else _block7(block, dtype))
        self.nbytes += sum(part.nbytes for part in products)
        *norm_1, eps = _floats(block.ln1)
        *norm_2, _ = _floats(block.ln2)
        *head_norm, head_eps = _floats(block.att.ln_x)
        vectors = [x.detach().float().flatten().contiguous() for x in vectors]
        return torch.classes.rwkv_wkv.Block([part.prepared for part in products],
                                            [*norm_1, *norm_2, *mixes, *vectors, *head_norm], eps, head_eps)

    def fresh(self, n_sequences: int) -> State:
        return State.zeros(self.dimensions, n_sequences, torch.float32)

    def advance(self, tokens: Tensor, cu_seqlens: Tensor, state: State) -> Tensor:
        """Like `Forward.advance`; hidden is float32."""
        x = self._layer_norm(F.embedding(tokens, self._embedding).float(), self._norm_in)
        self._advance(x, state.att_shift, state.wkv, state.ffn_shift, cu_seqlens)
        last = x if len(cu_seqlens) == len(x) + 1 else x[cu_seqlens[1:].long() - 1]
        return self._layer_norm(last, self._norm_out)

    def advance_each(self, tokens: Tensor, state: State) -> Tensor:
        return self.advance(tokens, torch.arange(len(tokens) + 1, dtype=torch.int32), state)

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, n_embd] -> float32 [S, vocab_size]."""
        return self._head(hidden)[0]

    def _layer_norm(self, x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm)


def decoder_for(model: RWKV) -> Forward | Kernels:
    """The decoder for this model on its device; a model that kernels run is taken apart."""
    if model.device.type == "cuda":
        return Forward(model, captures=True)
    by_kernels = (model.device.type == "cpu" and model.dtype != torch.float64 and native.supports(torch.empty(
        0, model.dimensions.n_head, model.dimensions.head_size)))
    return Kernels(model) if by_kernels else Forward(model)


# A block's products, mixes and other vectors.
_Laid = tuple[list[Products], list[Tensor], list[Tensor]]


def _block7(block: rwkv7.Block, dtype: torch.dtype) -> _Laid:
    """The arguments of `block7` in cpu/bindings_decode.cpp."""
    att, ffn = block.att, block.ffn
    mixes_values = hasattr(att, "v0")
    pairs = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)] + ([(att.v1, att.v2)] if mixes_values else [])
    square = [lay(x, dtype) for x in (att.receptance, att.key, att.value)]
    wide = Products([*square, *(lay(down.T, dtype) for down, _ in pairs)],
                    [IDENTITY, IDENTITY, IDENTITY, TANH, IDENTITY, SIGMOID, IDENTITY][:3 + len(pairs)])
    narrow = Products([lay(up.T, dtype) for _, up in pairs])
    output, value = (Products([lay(x, dtype)]) for x in (att.output, ffn.value))
    return ([wide, narrow, output, Products([lay(ffn.key, dtype)], [RELU_SQUARE]), value],
            [_rows(att.x_r, att.x_k, att.x_v, att.x_w, att.x_a, att.x_g), _rows(ffn.x_k)],
            [att.w0, att.a0, att.v0 if mixes_values else att.a0, att.k_k, att.k_a, att.r_k])


def _block6(block: rwkv6.Block, dtype: torch.dtype, dimensions: Dimensions) -> _Laid:
    """The same for `block6`."""
    att, ffn = block.att, block.ffn
    mix_in = Products([lay(w1.T, dtype) for w1 in att.time_maa_w1.split(dimensions.rank("mix"), dim=1)], [TANH] * 5)
    mix_out = Products([lay(w2.T, dtype) for w2 in att.time_maa_w2.unbind(0)])
    wide = Products([lay(x, dtype) for x in (att.time_decay_w1.T, att.key, att.value, att.receptance, att.gate)],
                    [TANH, IDENTITY, IDENTITY, IDENTITY, IDENTITY])
    decay, output, value = (Products([lay(x, dtype)]) for x in (att.time_decay_w2.T, att.output, ffn.value))
    up = Products([lay(ffn.key, dtype), lay(ffn.receptance, dtype)], [RELU_SQUARE, SIGMOID])
    return ([mix_in, mix_out, wide, decay, output, up, value],
            [_rows(att.time_maa_x), _rows(ffn.time_maa_k, ffn.time_maa_r),
             _rows(att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)],
            [att.time_decay, att.time_faaaa])


def _floats(norm: nn.LayerNorm | nn.GroupNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


def _rows(*vectors: Tensor) -> Tensor:
    return torch.stack([vector.detach().float().flatten() for vector in vectors])
