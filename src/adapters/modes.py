"""The adapters of linear layers, by their mode in a layer profile; the only place that lists them."""

from src.adapters.adapted import AdaptedLinear
from src.adapters.bone import BoneLinear
from src.adapters.dora import DoRALinear
from src.adapters.lora import LoRALinear
from src.adapters.pissa import PiSSALinear

ADAPTERS: dict[str, type[AdaptedLinear]] = {"lora": LoRALinear, "dora": DoRALinear, "pissa": PiSSALinear, "bone": BoneLinear}
