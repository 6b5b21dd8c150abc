"""The whole model around the blocks of rwkv6.py or rwkv7.py, and its construction from a checkpoint's tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.linear import Linear
from src.checkpoint.dimensions import Dimensions
from src.checkpoint.io import not_finite
from src.errors import NotFinite
from src.model import rwkv6, rwkv7
from src.model.layers import Packing, layer_norm, read_packing
from src.model.recompute import recomputed
from src.model.state import State
from src.quantization.linear import quantize_linear

Block = rwkv6.Block | rwkv7.Block
BLOCKS: dict[str, type[Block]] = {"x060": rwkv6.Block, "x070": rwkv7.Block}


class RWKV(nn.Module):
    """RWKV-6 or RWKV-7 over packed sequences; `dtype` is the precision of the computation."""

    def __init__(self, dimensions: Dimensions, dtype: torch.dtype):
        super().__init__()
        self.dimensions, self.dtype = dimensions, dtype
        # fp16 ends at 65504, which the residual stream of deep models exceeds, unlike the sublayers' own values.
        self.residual_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.emb = nn.Embedding(dimensions.vocab_size, dimensions.n_embd)
        blocks = nn.ModuleList(BLOCKS[dimensions.version](dimensions, layer) for layer in range(dimensions.n_layer))
        self.blocks = cast(Sequence[Block], blocks)  # a ModuleList's type does not name its elements'
        self.ln_out = nn.LayerNorm(dimensions.n_embd)
        self.head = Linear(dimensions.n_embd, dimensions.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.emb.weight.device

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None, state: State | None = None,
                parents: Tensor | None = None, grad_cp: bool = False) -> tuple[Tensor, State]:
        """Hidden vectors after ln_out, and the state after the last tokens.

        Args:
            tokens: int64 [T_total], sequences packed end to end, no padding.
            cu_seqlens: int32 [S + 1] on the CPU, their borders; None for one sequence.
            state: of the sequences before their first tokens; None for `initial_state`. It is not changed.
            parents: int64 [F]: each of the last F sequences continues from this one of the R roots before them, and its
                gradient flows back into the root. `state` is then that of the roots only.
            grad_cp: recompute most of each block in the backward instead of keeping it.

        Returns:
            hidden [T_total, n_embd] in `dtype`, and the State of all S sequences after their last tokens.
        """
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
        if state is None:
            n_roots = len(cu_seqlens) - 1 - (0 if parents is None else len(parents))
            state = self.initial_state(n_roots)
        return self.forward_packed(tokens, read_packing(cu_seqlens, parents, self.device), state, grad_cp)

    def forward_packed(self, tokens: Tensor, packing: Packing | None, state: State,
                       grad_cp: bool = False) -> tuple[Tensor, State]:
        """`forward` with its borders already read: reads no value on the host."""
        x = F.embedding(tokens, self.emb.weight).to(self.residual_dtype)
        x = layer_norm(x, self.blocks[0].ln0, self.residual_dtype)
        v_first: Tensor | None = None
        layers = []
        for block, att_shift, wkv, ffn_shift in zip(self.blocks, state.att_shift, state.wkv, state.ffn_shift, strict=True):
            arguments = (x, v_first, att_shift, wkv, ffn_shift, packing, self.dtype)
            x, v_first, *after = recomputed(block, *arguments) if grad_cp else block(*arguments)
            layers.append(after)
        return layer_norm(x, self.ln_out, self.dtype), State(*map(list, zip(*layers, strict=True)))

    def initial_state(self, n_sequences: int) -> State:
        """The state before any token: a block's trained `att.time_state` [H, value, key] if it has one, else zeros."""
        state = State.zeros(self.dimensions, n_sequences, self.dtype, self.device)
        for layer, block in enumerate(self.blocks):
            if block.att.time_state is not None:
                wkv = block.att.time_state.mT if self.dimensions.version == "x060" else block.att.time_state
                state.wkv[layer] = wkv.to(state.wkv[layer].dtype).expand_as(state.wkv[layer])
        return state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [..., n_embd] -> float32 logits [..., vocab_size] (float64 in a float64 model)."""
        logits = self.head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


def build_model(weights: Mapping[str, Tensor], dimensions: Dimensions, dtype: torch.dtype = torch.float32,
                device: torch.device | str = "cpu", quantize: str | None = None,
                hold: Callable[[str, Tensor], nn.Module | None] | None = None, quantize_head: bool = False) -> RWKV:
    """Build the model from an official-layout checkpoint; every parameter is frozen.

    Args:
        weights: parameter name -> tensor, checked against `dimensions` beforehand (`check_weights`).
        dtype: precision of the computation and of the weights.
        quantize: "nf4" or "int8" quantizes the blocks' linear weights, directly from the checkpoint's values. The embedding
            never is.
        hold: with `quantize`, makes the layer for a name and its weight, or returns None to leave it plain; default: quantize.
        quantize_head: quantize the head too, as generation does in int8, like the rwkv package; training never does.

    Raises NotFinite if `dtype` can't represent a weight.
    """
    with torch.device("meta"):
        model = RWKV(dimensions, dtype)
    for name, module in list(model.named_modules()):
        for leaf, _ in list(module.named_parameters(recurse=False)):
            weight = weights[f"{name}.{leaf}"].to(device)
            held = None
            if quantize and isinstance(module, Linear) and (name.startswith("blocks.") or (quantize_head and name == "head")):
                held = hold(name, weight) if hold else quantize_linear(weight, quantize)
            if held is not None:
                model.set_submodule(name, held)
            else:
                setattr(module, leaf, nn.Parameter(_cast(weight, dtype, f"{name}.{leaf}"), requires_grad=False))
    return model


def _cast(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = weight.to(dtype)
    # Kernels treat a 16-bit infinity as a number.
    wrong = not_finite({name: cast}) if cast.dtype != weight.dtype and cast.element_size() == 2 else None
    if wrong:
        held = str(dtype).removeprefix("torch.")
        raise NotFinite(f"the checkpoint's {wrong} are beyond the range of {held}; use a --strategy or --precision with fp32")
    return cast
