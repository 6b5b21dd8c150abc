"""The whole model around the blocks of rwkv6.py or rwkv7.py, and how it is built from a checkpoint's tensors."""

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
        # fp16 ends at 65504, which the residual stream of deep models passes; the sublayers' own values do not.
        self.residual_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.emb = nn.Embedding(dimensions.vocab_size, dimensions.n_embd)
        blocks = nn.ModuleList(BLOCKS[dimensions.version](dimensions, layer) for layer in range(dimensions.n_layer))
        self.blocks = cast(Sequence[Block], blocks)  # a ModuleList's type does not say of what
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
            cu_seqlens: int32 [S + 1] on the CPU, their borders; one sequence where None.
            state: of the sequences before their first tokens; `initial_state` where None. It is not changed.
            parents: int64 [F], for the last F sequences: which of those before them, the R roots, each goes on from, its
                gradient flowing back into it. `state` is that of the roots alone then.
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
        """`forward` with its borders read: nothing here looks at a value on the host."""
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
        """The state before any token: zeros, or where a block has a trained `att.time_state` [H, value, key], that."""
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
        dtype: precision of the computation and of the weights held.
        quantize: "nf4" or "int8" to hold the blocks' linear weights quantized, straight from the checkpoint's values.
            The embedding never is.
        hold: then makes the layer that holds the weight of a name, or None to leave it plain; just quantized where not given.
        quantize_head: the head too, which generation does in int8, as the rwkv package; training never does.

    Raises NotFinite where `dtype` can't hold a weight.
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
    # Kernels take infinity in 16 bits for a number.
    wrong = not_finite({name: cast}) if cast.dtype != weight.dtype and cast.element_size() == 2 else None
    if wrong:
        held = str(dtype).removeprefix("torch.")
        raise NotFinite(f"the checkpoint's {wrong} are beyond the numbers of {held}; use a --strategy or --precision with fp32")
    return cast
