"""`--strategy` in the syntax of the `rwkv` package: device, precision, and quantization."""

import re
from dataclasses import dataclass

import torch

from src.errors import UserError
from src.quantization.linear import STRATEGY_SUFFIXES
from src.values import Reader, shown

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZATIONS = {suffix: scheme for scheme, suffix in STRATEGY_SUFFIXES.items()}
STRATEGY = Reader(str, "device and precision, such as 'cuda bf16'")
HELP = ("device and precision in the syntax of the rwkv package: 'cuda fp16', 'cuda bf16', 'cpu fp32', "
        "'cuda fp16i8' (int8 weights), 'cuda bf16nf4' (NF4 weights), 'cuda:1 bf16'; if not given, the machine's best")


@dataclass(frozen=True)
class Strategy:
    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    quantization: str | None  # None, "int8" or "nf4"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def parse_strategy(text: str | None) -> Strategy:
    """Read `--strategy`; None means bf16 on a GPU that supports it, fp16 on another GPU, fp32 on the CPU.

    Raises:
        UserError: an unknown strategy, a model split over devices (`->`, `*n`), or a device that the machine lacks.
    """
    if text is None:
        if not torch.cuda.is_available():
            return Strategy(torch.device("cpu"), "fp32", None)
        return Strategy(torch.device("cuda"), "bf16" if torch.cuda.is_bf16_supported() else "fp16", None)
    if "->" in text or "*" in text:
        raise UserError(f"--strategy {shown(text)}: splitting a model over devices ('->', '*n') is not supported; name one")
    match = re.fullmatch(r"(cpu|cuda(?::([0-9]{1,9}))?) (fp32|bf16|fp16)(i8|nf4|i4|i3)?", " ".join(text.split()))
    if not match:
        raise UserError(f"--strategy {shown(text)} is not understood; write it like 'cuda bf16', 'cuda fp16i8' or 'cpu fp32'")
    device, index, precision, suffix = match.groups(default="")
    if suffix in ("i4", "i3"):
        raise UserError(f"--strategy {shown(text)}: {suffix} weights are not supported; take i8 or nf4")
    if device == "cpu":
        return Strategy(torch.device("cpu"), precision, QUANTIZATIONS[suffix])
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--strategy {shown(text)}: this machine has no such CUDA device; 'cpu fp32' works everywhere")
    return Strategy(torch.device("cuda", int(index)) if index else torch.device("cuda"), precision, QUANTIZATIONS[suffix])
