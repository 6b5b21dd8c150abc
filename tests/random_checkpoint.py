"""Random checkpoints of the official layout, with values like a trained model's, for tests and benchmarks.

Nothing in them is zero or constant, so that every parameter changes the logits; an official initialisation
would leave half of the paths dead.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from src.checkpoint.dimensions import Dimensions, expected_shapes
from src.errors import UserError

# name of a vector -> mean and standard deviation
NORMAL = {"k_k": (0.85, 0.1), "k_a": (1.0, 0.1), "a0": (0.0, 0.3), "v0": (1.0, 0.3)}
# name of a vector -> lowest and highest value; the token-shift mixes, which are 0 .. 1, go by their beginning
UNIFORM = {"r_k": (-0.1, 0.1), "time_faaaa": (-0.5, 1.0)}
DECAY = (-6.0, 1.0)  # from channels that forget over hundreds of tokens to such that forget at once


def make_dimensions(version: str, n_layer: int, n_embd: int, head_size: int, vocab_size: int,
                    n_ffn: int | None = None, ranks: Mapping[str, int] | None = None) -> Dimensions:
    """Dimensions of a float32 model of this size, the rest as the official releases choose it.

    Args:
        version: "x060" or "x070".
        n_ffn: width of the channel mix; by default 4 n_embd for v7, 3.5 n_embd in multiples of 32 for v6.
        ranks: low-rank widths, v6 "mix" and "decay", v7 "w", "a", "v", "g"; by default the sizes of the releases
            (RWKV-7: 1.8, 1.8 and 1.3 times the root of n_embd and 0.6 n_embd^0.8, in multiples of 32).

    Raises UserError for another version, or a head_size that does not divide n_embd.
    """
    if version not in ("x060", "x070"):
        raise UserError(f"version {version}: expected x060 or x070")
    if n_embd % head_size:
        raise UserError(f"head size {head_size} does not divide n_embd {n_embd}")
    if version == "x070":
        n_ffn = n_ffn or 4 * n_embd
        root = math.sqrt(n_embd)
        # The release of width 1024 has a gate narrower than the rule gives.
        gate = 128 if n_embd == 1024 else _multiple_of_32(0.6 * n_embd ** 0.8)
        ranks = ranks or {"w": _multiple_of_32(1.8 * root), "a": _multiple_of_32(1.8 * root),
                          "v": _multiple_of_32(1.3 * root), "g": gate}
        # A single block has no value residual.
        ranks = {**ranks, "v": ranks["v"] if n_layer > 1 else 0}
    else:
        n_ffn = n_ffn or max(32, int(3.5 * n_embd) // 32 * 32)
        ranks = ranks or ({"mix": 64, "decay": 128} if n_embd >= 4096 else {"mix": 32, "decay": 64})
    return Dimensions(version, n_layer, n_embd, vocab_size, n_embd // head_size, head_size, n_ffn,
                      tuple(sorted(ranks.items())), torch.float32)


def random_weights(dimensions: Dimensions, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random checkpoint: every tensor of `expected_shapes(dimensions)`, in `dtype`; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {key: _draw(key, shape, generator).to(dtype) for key, shape in expected_shapes(dimensions).items()}


class RandomWeights(Mapping[str, Tensor]):
    """The same in kind, drawn on `device` whenever a tensor is asked for: a model of any size is built with one copy in memory.

    Each tensor has a seed of its own, and a GPU draws other numbers than a CPU.
    """

    def __init__(self, dimensions: Dimensions, seed: int = 0, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
        self._shapes, self._seed, self._dtype, self._device = expected_shapes(dimensions), seed, dtype, device
        self._numbers = {key: number for number, key in enumerate(self._shapes)}

    def __getitem__(self, key: str) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seed * len(self) + self._numbers[key])
        return _draw(key, self._shapes[key], generator).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    module, name = key.split(".")[-2:]
    device = generator.device
    if name in ("w0", "time_decay"):
        order = torch.randperm(math.prod(shape), generator=generator, device=device)
        return torch.linspace(*DECAY, math.prod(shape), device=device)[order].reshape(shape)
    if len(shape) == 3 and shape[0] == 1 and name.startswith(("x_", "time_maa_")):
        return torch.rand(shape, generator=generator, device=device)
    if name in UNIFORM:
        low, high = UNIFORM[name]
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    if name in NORMAL:
        mean, deviation = NORMAL[name]
        return mean + deviation * noise
    if module.startswith("ln"):
        return (1.0 if name == "weight" else 0.0) + 0.1 * noise
    if module == "emb":
        return noise
    if name.endswith("2"):
        return 0.1 * noise
    # What is left multiplies a hidden vector: the low-rank ones [fan_in, rank], the linear ones [out, fan_in].
    return noise / math.sqrt(shape[0] if name.endswith("1") else shape[1])


def _multiple_of_32(width: float) -> int:
    return max(32, round(width / 32) * 32)
