"""merge.py's work: what it writes where, what it reports, and what it will not overwrite."""

import shutil
from pathlib import Path

import pytest
import torch

from src.adapters.files import read_adapter, save_adapter
from src.adapters.merge import MergeConfig, merge
from src.checkpoint.io import fingerprint, load_checkpoint, save_checkpoint
from src.errors import UserError
from tests.adapters.test_with_the_model import adapted, random_checkpoint
from tests.adapters.tiny import profile

STATE = "blocks.1.att.time_state"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with base.pth, lora.safetensors (a LoRA in block 0) and state.safetensors (the same, and a state in block 1)."""
    folder = tmp_path_factory.mktemp("merge")
    weights, dimensions = random_checkpoint("x070")
    save_checkpoint(weights, folder / "base.pth")
    for name, second in (("lora", "freeze"), ("state", "state")):
        settings = profile("freeze", "lora", second, "freeze", state_lr_init=1.0, state_lr_final=0.1)
        model = adapted(weights, dimensions, settings, step=0.1)
        save_adapter(model, folder / f"{name}.safetensors", settings, fingerprint(weights), {})
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def refused(config: MergeConfig, folder: Path, *words: object) -> None:
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        merge(config)
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_it_writes_the_model_and_the_states_if_there_are_any(made, tmp_path, capsys, kind):
    output, states = tmp_path / "merged.pth", tmp_path / "merged.state.pth"
    merge(MergeConfig(base=str(made / "base.pth"), adapter=str(made / f"{kind}.safetensors"), output=str(output)),
          ["note: first", "note: second"])
    base, merged = load_checkpoint(made / "base.pth"), load_checkpoint(output)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not merged[name].equal(base[name])}
    assert changed == {f"blocks.0.{part}.weight" for part in (
        "att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")}
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["note: first", "note: second"] and str(output) in lines[2] and f"6 of {len(base)} " in lines[2]
    if kind == "state":
        found = load_checkpoint(states)
        assert found.keys() == {STATE} and found[STATE].equal(read_adapter(made / "state.safetensors").weights[STATE])
        assert len(lines) == 4 and str(states) in lines[3]
    else:
        assert len(lines) == 3 and not states.exists()


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_a_merge_again_replaces_what_it_wrote_before(made, tmp_path, kind):
    output, states = tmp_path / "merged.pth", tmp_path / "merged.state.pth"
    output.write_text("the model before")
    states.write_text("the states before")
    merge(MergeConfig(base=str(made / "base.pth"), adapter=str(made / f"{kind}.safetensors"), output=str(output)))
    assert load_checkpoint(output).keys() == load_checkpoint(made / "base.pth").keys()
    if kind == "state":
        assert load_checkpoint(states)[STATE].abs().sum() > 0
    else:
        assert states.read_text() == "the states before"


def test_states_do_not_replace_a_file_that_no_merge_has_written(made, tmp_path):
    output, states = tmp_path / "merged.pth", tmp_path / "merged.state.pth"
    states.write_text("mine")
    refused(MergeConfig(base=str(made / "base.pth"), adapter=str(made / "state.safetensors"), output=str(output)), tmp_path,
            states, "overwrite")
    # Without states there is nothing that would.
    merge(MergeConfig(base=str(made / "base.pth"), adapter=str(made / "lora.safetensors"), output=str(output)))
    assert states.read_text() == "mine" and output.exists()


@pytest.mark.parametrize("source", ["base", "adapter"])
def test_no_output_replaces_an_input(made, tmp_path, source):
    base, adapter = (shutil.copy(made / name, tmp_path / new) for name, new in (
        ("base.pth", "model.state.pth"), ("state.safetensors", "a.safetensors")))
    output = {"base": base, "adapter": adapter}[source]
    refused(MergeConfig(base=base, adapter=adapter, output=output), tmp_path, output, f"--{source}")
    # The states' file would be the base.
    (tmp_path / "model.pth").write_text("the model before")
    refused(MergeConfig(base=base, adapter=adapter, output=str(tmp_path / "model.pth")), tmp_path, base, "--base")


def test_an_adapter_of_another_base_writes_nothing_and_says_no_notes(made, tmp_path, capsys):
    other, _ = random_checkpoint("x070")
    other["head.weight"] = other["head.weight"] + torch.ones(())
    save_checkpoint(other, tmp_path / "other.pth")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="trained on the base model"):
        merge(MergeConfig(base=str(tmp_path / "other.pth"), adapter=str(made / "lora.safetensors"),
                          output=str(tmp_path / "merged.pth")), ["note: first"])
    assert contents(tmp_path) == before and capsys.readouterr().err == ""
