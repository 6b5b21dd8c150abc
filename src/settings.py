"""Settings: frozen dataclasses whose fields are the one description of each flag.

A field made by `flag` is a setting: its name is the flag's, its type that of the resolved value, and its metadata hold what the
flag takes, its default, its help, and whether it may change on a resume. A field made by `group` is a dataclass of settings under
a title; one made by `table` maps flags' names to their values. The parser, docs/flags.md, a run's config.json and the checks of
a resumed run are all made from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from src.files import named_file
from src.values import Reader, input_file, layer_profile, template, tokenizer

Config = TypeVar("Config")
# In place of a default: the flag is required; the script finds the value out if the flag is not given.
NEEDED: Any = object()
RESOLVED: Any = object()
READ_FILES = (input_file, layer_profile, tokenizer, template)


@dataclass(frozen=True)
class Flag:
    """The description of `--NAME`."""

    read: Reader | tuple[str, ...]  # a tuple lists the words that it takes
    default: Any  # or NEEDED, or RESOLVED
    help: str
    free: bool = False  # may change on a resume, since it changes no number beyond rounding
    repeats: bool = False  # may be given several times; its value is a tuple

    @property
    def takes(self) -> str:
        return self.read.takes if isinstance(self.read, Reader) else ", ".join(self.read)

    @property
    def shown_default(self) -> Any:
        """The default as written on a command line; None or "" where there is none."""
        if self.default in (NEEDED, RESOLVED):
            return None
        if isinstance(self.default, bool):
            return str(int(self.default))
        return self.default.replace("\n", r"\n") if isinstance(self.default, str) else self.default


class Named(NamedTuple):
    """A flag with its name, without dashes, and the title of its group."""

    name: str
    flag: Flag
    title: str | None


def flag(read: Reader | tuple[str, ...], default: Any, help: str, free: bool = False, repeats: bool = False) -> Any:
    """A field that is a setting; see `Flag`."""
    described = {"flag": Flag(read, default, help, free, repeats)}
    return field(metadata=described) if default in (NEEDED, RESOLVED) else field(default=default, metadata=described)


def group(title: str | None) -> Any:
    """A field whose type is a dataclass of settings; `title` heads its flags in --help, None for no heading."""
    return field(metadata={"group": title})


def table(flags: Mapping[str, Flag]) -> Any:
    """A field that maps the names of these flags to their values."""
    return field(metadata={"table": flags})


def flags_of(settings: type, title: str | None = None) -> Iterator[Named]:
    """All flags of a dataclass of settings, in its order."""
    for part in fields(settings):
        if "flag" in part.metadata:
            yield Named(part.name, part.metadata["flag"], title)
        elif "table" in part.metadata:
            yield from (Named(name, one, title) for name, one in part.metadata["table"].items())
        elif "group" in part.metadata:
            assert isinstance(part.type, type)
            yield from flags_of(part.type, part.metadata["group"])


def build(settings: type[Config], values: Mapping[str, Any]) -> Config:
    """Settings from values by flag, or by field for fields that are no flags. Raises TypeError for any other name."""
    left = dict(values)
    made = _take(settings, left)
    if left:
        raise TypeError(f"{settings.__name__} has no {', '.join(sorted(left))}")
    return made


def _take(settings: type[Config], left: dict[str, Any]) -> Config:
    """Settings from the values that are theirs, which are taken out of `left`."""
    made: dict[str, Any] = {}
    for part in fields(settings):  # type: ignore[arg-type]
        if "group" in part.metadata:
            assert isinstance(part.type, type)
            made[part.name] = _take(part.type, left)
        elif "table" in part.metadata:
            numbers = {name: left.pop(name, one.default) for name, one in part.metadata["table"].items()}
            made[part.name] = MappingProxyType(numbers)
        elif part.name in left:
            made[part.name] = left.pop(part.name)
    return settings(**made)


def flat(config: Any) -> dict[str, Any]:
    """The values of all settings, by flag; of fields that are no flags, by name."""
    values: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        values |= flat(value) if "group" in part.metadata else value if "table" in part.metadata else {part.name: value}
    return values


def defaults(settings: type) -> dict[str, Any]:
    """The default of each flag that has one."""
    return {name: one.default for name, one, _ in flags_of(settings) if one.default not in (NEEDED, RESOLVED)}


def free_on_resume(settings: type) -> set[str]:
    """The flags that may differ between a run and its continuation."""
    return {name for name, one, _ in flags_of(settings) if one.free}


def input_files(config: Any) -> list[tuple[str, Path]]:
    """The files that a job reads, each with its flag, and their sidecars."""
    values = flat(config)
    given = [(f"--{name}", path) for name, one, _ in flags_of(type(config))
             if one.read in READ_FILES and (path := named_file(name, values[name]))]
    # A checkpoint may be named without its ending.
    found = ((name, Path(f"{value}{ending}")) for name, value in given for ending in ("", ".pth", ".json"))
    return [(name, path) for name, path in found if path.is_file()]


