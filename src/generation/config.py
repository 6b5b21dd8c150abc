"""Everything reject generation is told, as frozen values; src/cli/generate.py makes them from the flags."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, in the words of the flags. The defaults are those of this family's reject generation."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 0.3
    top_k: int = 0  # 0: no limit
    presence: float = 0.0
    frequency: float = 1.0
    penalty_decay: float = 0.996
    max_tokens: int = 1000
    stop: str = "\n\n"  # text that ends an answer and is no part of it; "" for none
    ban_end_of_text: bool = True


@dataclass(frozen=True)
class GenerateConfig:
    """Names are those of the flags; device, precision, dtype and quantization are what `--strategy` says."""

    load_model: str
    input_csv: str
    output_csv: str
    tokenizer: str | None
    sampling: Sampling
    seed: int
    batch_size: int | None  # None: what memory has room for
    num_rejects: int
    avoid_equal: bool
    ctx_len: int
    overwrite: bool
    device: torch.device
    precision: str
    dtype: torch.dtype
    quantization: str | None
    skip_bad_rows: bool = False
