"""The adapters of linear layers, by the word for them in a layer profile; nothing else names one."""

from src.adapters.adapted import AdaptedLinear
from src.adapters.bone import BoneLinear
from src.adapters.dora import DoRALinear
from src.adapters.lora import LoRALinear
from src.adapters.pissa import PiSSALinear

ADAPTERS: dict[str, type[AdaptedLinear]] = {"lora": LoRALinear, "dora": DoRALinear, "pissa": PiSSALinear, "bone": BoneLinear}
