"""RWKV-6 and RWKV-7 once more, from the papers and the official code: float64, one text, token by token, no modules.

A model is the dictionary of its checkpoint's tensors, differentiable in all of them. Nothing of src/ has a part in this, and
tests/model/test_logits.py compares it with the published `rwkv` package.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
HEAD_NORM_EPS = 64e-5


def logits(weights: Weights, tokens: list[int]) -> Tensor:
    """[T, vocab_size] float64: what the model expects after each of T tokens.

    Args:
        weights: float64, by their official names; v7 is told by its r_k. `blocks.N.att.time_state` [head, value, key],
            where there, is the recurrence's state before the first token.
    """
    x = _layer_norm(weights["emb.weight"][torch.tensor(tokens)], weights, "blocks.0.ln0")
    time_mixing, channel_mixing = (_time_7, _channel_7) if "blocks.0.att.r_k" in weights else (_time_6, _channel_6)
    v_first = None
    for layer in range(sum(name.endswith("ln1.weight") for name in weights)):
        block = _part(weights, f"blocks.{layer}.")
        y, v_first = time_mixing(_layer_norm(x, block, "ln1"), _part(block, "att."), v_first)
        x = x + y
        x = x + channel_mixing(_layer_norm(x, block, "ln2"), _part(block, "ffn."))
    return _layer_norm(x, weights, "ln_out") @ weights["head.weight"].T


def log_probs(weights: Weights, tokens: list[int]) -> Tensor:
    """[T - 1], in nats: log p of each token after the first, given those before it."""
    return torch.log_softmax(logits(weights, tokens[:-1]), -1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]


def recur_6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv:2404.05892, equations 16-19. r, w (the decay), k, v [T, H, N], u [H, N], state [H, key, value] -> y, state."""
    outputs = []
    for t in range(len(r)):
        kv = k[t][:, :, None] * v[t][:, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", r[t], state + u[:, :, None] * kv))
        state = w[t][:, :, None] * state + kv
    return torch.stack(outputs), state


def recur_7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv:2503.14456, equations 16-18. r, w (the decay), k, v, kappa, a [T, H, N], state [H, value, key] -> y, state."""
    outputs = []
    for t in range(len(r)):
        removed = torch.einsum("hvk,hk->hv", state, kappa[t])[:, :, None] * (kappa[t] * a[t])[:, None, :]
        state = state * w[t][:, None, :] - removed + v[t][:, :, None] * k[t][:, None, :]
        outputs.append(torch.einsum("hvk,hk->hv", state, r[t]))
    return torch.stack(outputs), state


def _time_6(x: Tensor, p: Weights, _: None) -> tuple[Tensor, None]:
    dx, heads = _shifted(x) - x, p["time_faaaa"].shape
    moved = torch.tanh((x + dx * p["time_maa_x"].flatten()) @ p["time_maa_w1"]).chunk(5, dim=1)
    x_w, x_k, x_v, x_r, x_g = (x + dx * (p[f"time_maa_{name}"].flatten() + moved[at] @ p["time_maa_w2"][at])
                               for at, name in enumerate("wkvrg"))
    r, k, v, g = (y @ p[f"{name}.weight"].T for y, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"), (x_g, "gate")))
    d = p["time_decay"].flatten() + torch.tanh(x_w @ p["time_decay_w1"]) @ p["time_decay_w2"]
    r, k, v, w = (y.unflatten(1, heads) for y in (r, k, v, torch.exp(-torch.exp(d))))
    y, _ = recur_6(r, w, k, v, p["time_faaaa"], _start(p, heads).mT)
    return (_head_norm(y, p) * F.silu(g)) @ p["output.weight"].T, None


def _time_7(x: Tensor, p: Weights, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
    dx, heads = _shifted(x) - x, p["r_k"].shape
    x_r, x_w, x_k, x_v, x_a, x_g = (x + dx * p[f"x_{name}"].flatten() for name in "rwkvag")
    r, k, v = x_r @ p["receptance.weight"].T, x_k @ p["key.weight"].T, x_v @ p["value.weight"].T
    w = torch.exp(-torch.exp(-F.softplus(-(p["w0"].flatten() + torch.tanh(x_w @ p["w1"]) @ p["w2"])) - 0.5))
    a = torch.sigmoid(p["a0"].flatten() + x_a @ p["a1"] @ p["a2"])
    g = torch.sigmoid(x_g @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"].flatten() + x_v @ p["v1"] @ p["v2"])
    kappa = F.normalize((k * p["k_k"].flatten()).unflatten(1, heads), dim=-1)
    k = k * (1 + (a - 1) * p["k_a"].flatten())
    r, k, v, w, a = (y.unflatten(1, heads) for y in (r, k, v, w, a))
    y, _ = recur_7(r, w, k, v, kappa, a, _start(p, heads))
    y = _head_norm(y, p) + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v).flatten(1)
    return (y * g) @ p["output.weight"].T, v_first


def _channel_6(x: Tensor, p: Weights) -> Tensor:
    dx = _shifted(x) - x
    k = torch.relu((x + dx * p["time_maa_k"].flatten()) @ p["key.weight"].T) ** 2
    return torch.sigmoid((x + dx * p["time_maa_r"].flatten()) @ p["receptance.weight"].T) * (k @ p["value.weight"].T)


def _channel_7(x: Tensor, p: Weights) -> Tensor:
    return torch.relu((x + (_shifted(x) - x) * p["x_k"].flatten()) @ p["key.weight"].T) ** 2 @ p["value.weight"].T


def _shifted(x: Tensor) -> Tensor:
    """Each token's predecessor; zeros before the first."""
    return torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def _start(p: Weights, heads: torch.Size) -> Tensor:
    """[head, value, key]"""
    return p["time_state"] if "time_state" in p else torch.zeros(*heads, heads[-1], dtype=torch.float64)


def _layer_norm(x: Tensor, p: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def _head_norm(y: Tensor, p: Weights) -> Tensor:
    return F.group_norm(y.flatten(1), y.shape[1], p["ln_x.weight"], p["ln_x.bias"], HEAD_NORM_EPS)


def _part(weights: Weights, beginning: str) -> dict[str, Tensor]:
    return {name.removeprefix(beginning): tensor for name, tensor in weights.items() if name.startswith(beginning)}
