"""merge.py's work: merge an adapter into the base that it was trained on, giving an ordinary checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src import values
from src.adapters.files import merge_adapter, read_adapter, save_states, states_path
from src.adapters.state import states_in
from src.checkpoint.base import load_base_and_fingerprint
from src.checkpoint.io import save_checkpoint
from src.console import say
from src.errors import UserError
from src.files import check_output
from src.settings import NEEDED, flag, input_files


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """merge.py's flags, resolved."""

    base: str = flag(values.input_file, NEEDED, "the base checkpoint, .pth or .safetensors")
    adapter: str = flag(values.input_file, NEEDED, "adapter file of train.py")
    output: str = flag(values.output, NEEDED,
                       "checkpoint to write, .pth or .safetensors by its ending; trained initial states go into a file next to "
                       "it, NAME.state.pth")


def merge(config: MergeConfig, notes: Sequence[str] = ()) -> None:
    """Write `config.output`, and next to it a file of trained initial states if the adapter has some.

    Args:
        notes: lines about the command, printed on stderr once all checks have passed.

    Raises:
        UserError: an error that the user can fix; nothing has been written then.
    """
    inputs = input_files(config)
    check_output(config.output, inputs)
    adapter = read_adapter(config.adapter)
    states = states_in(adapter.weights)
    if states:
        beside = states_path(config.output)
        check_output(beside, inputs)
        if beside.exists() and not Path(config.output).exists():
            raise UserError(f"{beside}: the trained states would overwrite it; choose another --output, or remove it")
    base, _, fingerprint = load_base_and_fingerprint(config.base)
    merged = merge_adapter(base, adapter, fingerprint)
    for note in notes:
        say(note)
    changed = sum(merged[name] is not base[name] for name in base)
    save_checkpoint(merged, config.output)
    say(f"{config.output}: {changed} of {len(base)} tensors changed")
    if written := save_states(states, config.output):
        say(f"{written}: the trained initial states, which no weight can express; load it together with the model")
