"""The flags of merge.py, and the merge itself: read, merge, write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.adapters.files import merge_adapter, read_adapter, save_states, states_path
from src.adapters.state import states_in
from src.checkpoint.base import load_base_and_fingerprint
from src.checkpoint.io import save_checkpoint
from src.cli.parser import Parser, notes
from src.cli.values import output, path
from src.console import say
from src.errors import UserError
from src.files import check_output, input_files


@dataclass(frozen=True)
class MergeFlags:
    base: str
    adapter: str
    output: str


def parser() -> Parser:
    parser = Parser("Merge an adapter into the base model it was trained on, in the base's layout and precision.")
    parser.add_argument("--base", type=path, required=True, help="the base checkpoint, .pth or .safetensors")
    parser.add_argument("--adapter", type=path, required=True, help="adapter file of train.py")
    parser.add_argument("--output", type=output, required=True,
                        help="checkpoint to write, .pth or .safetensors by its ending; trained initial states go into a "
                             "file beside it, NAME.state.pth")
    return parser


def parse(arguments: Sequence[str]) -> tuple[MergeFlags, tuple[str, ...]]:
    own = parser()
    flags = vars(own.parse_args(arguments))
    return MergeFlags(**flags), notes(own.given(arguments), [])


def merge(flags: MergeFlags, told: Sequence[str] = ()) -> None:
    inputs = input_files(flags, ("base", "adapter"))
    check_output(flags.output, inputs)
    adapter = read_adapter(flags.adapter)
    states = states_in(adapter.weights)
    if states:
        beside = states_path(flags.output)
        check_output(beside, inputs)
        if beside.exists() and not Path(flags.output).exists():
            raise UserError(f"{beside}: the trained states would overwrite it; choose another --output, or remove it")
    base, _, fingerprint = load_base_and_fingerprint(flags.base)
    merged = merge_adapter(base, adapter, fingerprint)
    for note in told:
        say(note)
    changed = sum(merged[name] is not base[name] for name in base)
    save_checkpoint(merged, flags.output)
    say(f"{flags.output}: {changed} of {len(base)} tensors changed")
    if states := save_states(states, flags.output):
        say(f"{states}: the trained initial states, which no weight can express; load it beside the model")
