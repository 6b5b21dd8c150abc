"""RWKV-6 and RWKV-7 as plain torch modules with the official parameter names."""

from src.model.rwkv import RWKV, build_model
from src.model.state import State

__all__ = ["RWKV", "State", "build_model"]
