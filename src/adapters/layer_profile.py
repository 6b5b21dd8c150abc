"""The layer profile: which layers are frozen, trained in full or through an adapter, and at which rates.

A CSV with one row for `emb`, for each block `0` ... `L-1` and for `head`; layerprofile/readme.md explains the columns.
`emb` is emb.weight, a block everything under `blocks.N.` (block 0 with ln0), and `head` is head.weight and ln_out.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from src.adapters.adapted import AdaptedLinear
from src.adapters.modes import ADAPTERS
from src.adapters.state import LEAF
from src.errors import UserError
from src.files import existing_file
from src.numbers import BELOW_ONE, RATE, STRENGTH, read_number

# The modes of a block; for those of emb and head see `_modes_of`.
MODES = ("freeze", "full", *ADAPTERS, "state")
BLOCK_MODES = MODES[1:]
# Other names of Bone, an earlier and the present one.
SYNONYMS = {"disha": "bone", "miss": "bone"}


@dataclass(frozen=True)
class LayerSetting:
    """One row of a profile. Rates are per optimizer step; values that the row's mode does not use may be 0."""

    layer: str  # "emb", "0", "1", ..., "head"
    mode: str  # one of MODES
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    weight_lr_init: float = 0.0
    weight_lr_final: float = 0.0
    weight_decay: float = 0.0
    state_lr_init: float = 0.0
    state_lr_final: float = 0.0
    reject_parts: tuple[str, ...] = ()
    full_parts: tuple[str, ...] = ()

    def rejects(self, local_name: str) -> bool:
        """Whether a parameter, named without `blocks.N.`, stays untrained: one of the parts occurs in its name.

        For a linear layer that would get an adapter, the name is its weight's.
        """
        return any(part in local_name for part in self.reject_parts)

    def in_full(self, local_name: str) -> bool:
        """Whether a parameter of the model itself trains, named without `blocks.N.`."""
        named = self.mode == "full" or any(part in local_name for part in self.full_parts)
        return named and not self.rejects(local_name)

    def adapter(self, local_name: str) -> type[AdaptedLinear] | None:
        """The adapter of a linear weight, named likewise; None if it has none."""
        return None if self.rejects(local_name) or self.in_full(local_name) else ADAPTERS.get(self.mode)

    def rates(self, local_name: str) -> tuple[float, float]:
        """First and last learning rate of a parameter."""
        state = local_name == f"att.{LEAF}"
        return (self.state_lr_init, self.state_lr_final) if state else (self.weight_lr_init, self.weight_lr_final)


COLUMNS = ("Layer", "Mode", "Rank", "Alpha", "Dropout", "Weight_lr_init", "Weight_lr_final", "Weight_decay",
           "State_lr_init", "State_lr_final", "RejectParts", "FullParts")
NUMBERS = COLUMNS[2:10]
WEIGHT_RATES = ("Weight_lr_init", "Weight_lr_final")
# Ranges of numbers other than 0, as in train.py's flags for the same; anything beyond is a typo.
RANGES = {"Rank": (1, 65536), "Alpha": STRENGTH, "Dropout": BELOW_ONE, **dict.fromkeys(NUMBERS[3:], RATE)}
LARGEST_FILE = 1 << 24  # bytes
# Columns of RWKV-LM-RLHF's profiles for v6, which have no rates; accepted but not read, as there.
OLD_COLUMNS = ("LISAProb", "LoRAProb", "LRScale")
# The columns that each mode requires; any other cell may be empty and then counts as 0.
NEEDED = {"freeze": (), "full": WEIGHT_RATES, "state": ("State_lr_init", "State_lr_final"),
          **{mode: (*adapter.needs, *WEIGHT_RATES) for mode, adapter in ADAPTERS.items()}}


def layer_of(name: str) -> tuple[str, str]:
    """The layer that a parameter belongs to, and its name there: `blocks.3.att.key.weight` -> ("3", "att.key.weight").

    Outside the blocks the name is unchanged: ("emb", "emb.weight"), ("head", "ln_out.bias").
    """
    if name.startswith("blocks."):
        _, layer, local_name = name.split(".", 2)
        return layer, local_name
    return ("emb" if name.startswith("emb.") else "head"), name


def read_layer_profile(path: str | Path, n_layer: int, rates: tuple[float, float] = (0.0, 0.0)) -> list[LayerSetting]:
    """Read a profile for a model of `n_layer` blocks.

    Columns may be in any order and case, RejectParts and FullParts may be absent, blank lines are skipped.

    Args:
        rates: lr_init and lr_final of every layer if the profile is an old one (`OLD_COLUMNS`) without columns for them.

    Returns:
        A setting for emb, 0 ... n_layer - 1 and head, always in this order.

    Raises:
        UserError: names the file, and the faulty row, layer or column.
    """
    path = existing_file(path, "layer profile")
    header, rows = _read_rows(path)
    unread = dict(zip(WEIGHT_RATES, map(str, rates), strict=True)) if _lacks_rates(header) else {}

    settings: dict[str, LayerSetting] = {}
    for line, row in rows:
        where = f"layer profile {path}, line {line}"
        if any(row[len(header):]):
            raise UserError(f"{where}: {len(row)} cells for {len(header)} columns; "
                            f"put RejectParts and FullParts in quotes where they name several parts")
        setting = _read_row(unread | dict(zip(header, row, strict=False)), n_layer, where)
        if setting.layer in settings:
            raise UserError(f"{where}: layer {setting.layer} is there twice")
        settings[setting.layer] = setting
    layers = all_layers(n_layer)
    missing = [layer for layer in layers if layer not in settings]
    if missing:
        raise UserError(f"layer profile {path}: no row for layer {', '.join(missing)}; "
                        f"a checkpoint of {n_layer} layers needs emb, 0 to {n_layer - 1}, head")
    return [settings[layer] for layer in layers]


def setting_of(row: Mapping[str, Any], n_layer: int, where: str) -> LayerSetting:
    """A setting from what JSON makes of `dataclasses.asdict`, checked like a row of a profile.

    Args:
        row: values of the fields' types; fields with a default may be missing.

    Raises UserError, beginning with `where`.
    """
    names = {field.name for field in fields(LayerSetting)}
    if unknown := row.keys() - names:
        raise UserError(f"{where}: has {min(unknown)[:60]!r}, which no row has")
    columns = {column.lower(): column for column in COLUMNS} | {"reject_parts": "RejectParts", "full_parts": "FullParts"}
    cells = {columns[name]: ",".join(value) if isinstance(value, list) else str(value) for name, value in row.items()}
    return _read_row(cells, n_layer, where)


def has_rates(path: str | Path) -> bool:
    """Whether a profile has its own learning rates; also True for a file that `read_layer_profile` will refuse."""
    try:
        return not _lacks_rates(_read_rows(existing_file(path, "layer profile"))[0])
    except UserError:
        return True


def auto_layer_profile(n_layer: int, lr_init: float, lr_final: float, rank: int = 16, alpha: float = 32.0,
                       mode: str = "lora") -> list[LayerSetting]:
    """A profile for any depth: one mode without dropout in every block, emb and head frozen, weight decay 0.01."""
    first, last = NEEDED[mode][-2:]
    rates: dict[str, Any] = {first.lower(): lr_init, last.lower(): lr_final}
    blocks = [LayerSetting(str(layer), mode, rank, alpha, weight_decay=0.01, **rates) for layer in range(n_layer)]
    return [LayerSetting("emb", "freeze"), *blocks, LayerSetting("head", "freeze")]


def with_rates(settings: list[LayerSetting], lr_init: float, lr_final: float) -> list[LayerSetting]:
    """The same profile with these two learning rates for the weights and states of every layer."""
    return [replace(setting, weight_lr_init=lr_init, weight_lr_final=lr_final, state_lr_init=lr_init, state_lr_final=lr_final)
            for setting in settings]


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns' names as in COLUMNS, and the rows below them, each with its line number."""
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"layer profile {path}: has {path.stat().st_size} bytes, but a profile has one row a layer")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            rows = [(reader.line_num, cells) for row in reader if any(cells := [cell.strip() for cell in row])]
    except UnicodeDecodeError as error:
        raise UserError(f"layer profile {path}: not a CSV in UTF-8 ({error})") from error
    except csv.Error as error:
        raise UserError(f"layer profile {path}, line {reader.line_num}: not a CSV ({error})") from error
    if not rows:
        raise UserError(f"layer profile {path}: the file is empty; its first line names the columns")
    return _read_header(rows[0][1], path), rows[1:]


def _lacks_rates(header: list[str]) -> bool:
    return bool(set(OLD_COLUMNS) & set(header)) and not set(WEIGHT_RATES) & set(header)


def all_layers(n_layer: int) -> list[str]:
    return ["emb", *map(str, range(n_layer)), "head"]


def _read_header(titles: list[str], path: Path) -> list[str]:
    """The columns' names as in COLUMNS; an empty title, as spreadsheets leave at the right, stays empty."""
    spelling = {column.lower(): column for column in COLUMNS + OLD_COLUMNS} | {"": ""}
    for title in titles:
        if title.lower() not in spelling:
            raise UserError(f"layer profile {path}: unknown column {title[:60]!r}; the columns are {', '.join(COLUMNS)}")
    header = [spelling[title.lower()] for title in titles]
    for column in COLUMNS:
        if header.count(column) > 1:
            raise UserError(f"layer profile {path}: column {column} is there twice")
        if column in ("Layer", "Mode") and column not in header:
            raise UserError(f"layer profile {path}: no column {column}; the columns are {', '.join(COLUMNS)}")
    return header


def _read_row(cells: dict[str, str], n_layer: int, where: str) -> LayerSetting:
    layer = _read_layer(cells.get("Layer", ""), n_layer, where)
    where = f"{where} (layer {layer})"
    mode = cells.get("Mode", "").lower()
    mode = SYNONYMS.get(mode, mode)
    if mode not in MODES:
        raise UserError(f"{where}: unknown mode {mode[:60]!r}; choose one of {', '.join(MODES)}")
    if mode not in _modes_of(layer):
        raise UserError(f"{where}: mode {mode} is not for {layer}; choose one of {', '.join(_modes_of(layer))}")
    parts = {column: tuple(part for cell in cells.get(column, "").split(",") if (part := cell.strip()))
             for column in ("RejectParts", "FullParts")}
    for column in (*NEEDED[mode], *(WEIGHT_RATES if parts["FullParts"] else ())):
        if not cells.get(column):
            what = f"mode {mode}" if column in NEEDED[mode] else "FullParts"
            raise UserError(f"{where}: {column} is empty, and {what} needs it")

    numbers = {column: _read_number(cells.get(column), column, where) for column in NUMBERS}
    if numbers["Rank"] != int(numbers["Rank"]):
        raise UserError(f"{where}: Rank is {cells['Rank']}; it must be a whole number")
    for column in NEEDED[mode]:
        if column in ("Rank", "Alpha") and not numbers[column]:
            raise UserError(f"{where}: {column} must be above 0 in mode {mode}")
    values: dict[str, Any] = {column.lower(): number for column, number in numbers.items()} | {"rank": int(numbers["Rank"])}
    return LayerSetting(layer, mode, **values, reject_parts=parts["RejectParts"], full_parts=parts["FullParts"])


def _modes_of(layer: str) -> tuple[str, ...]:
    if layer == "emb":
        return ("freeze", "full")
    return ("freeze", "full", *ADAPTERS) if layer == "head" else MODES


def _read_layer(cell: str, n_layer: int, where: str) -> str:
    if cell.lower() in ("emb", "head"):
        return cell.lower()
    if not (cell.isascii() and cell.isdigit() and len(cell) < 10):
        raise UserError(f"{where}: layer {cell[:60]!r} is neither emb, head nor the number of a block")
    if int(cell) >= n_layer:
        raise UserError(f"{where}: layer {cell} is not in the checkpoint, which has {n_layer} layers (0 to {n_layer - 1})")
    return str(int(cell))


def _read_number(cell: str | None, column: str, where: str) -> float:
    cell, (least, most) = cell or "0", RANGES[column]
    if (number := read_number(cell)) is None:
        raise UserError(f"{where}: {column} is {cell[:60]!r}, not a number, or one too close to 0")
    if number and not least <= number <= most:
        raise UserError(f"{where}: {column} is {cell[:60]}; it must be 0 or a number from {least:g} to {most:.7g}")
    return number
