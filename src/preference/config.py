"""Everything the preparation of pairs is told, as one frozen value; src/cli/prepare.py makes it from the flags."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrepareConfig:
    """Names are those of the flags; device, precision, dtype and quantization are what `--strategy` says."""

    load_model: str | None  # None only with check_data, where the tokenizer is named
    input_csv: str
    output_save: str | None  # None only with check_data
    target_pair_count: int | None
    rlhf_max_corpus_len: int
    tokenizer: str | None
    layer_profile: str | None
    seed: int
    batch_tokens: int
    device: torch.device
    precision: str
    dtype: torch.dtype
    quantization: str | None
    reference: bool = True
    peft: str = "lora"
    lora_r: int = 16
    check_data: bool = False
    skip_bad_rows: bool = False
