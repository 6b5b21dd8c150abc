"""Settings with some of them changed."""

from typing import Any, TypeVar

from src.settings import build, flat

Config = TypeVar("Config")


def changed(config: Config, **values: Any) -> Config:
    """The same settings but for these, by flag."""
    before = flat(config)
    assert set(values) <= set(before), f"no settings: {set(values) - set(before)}"
    return build(type(config), before | values)
