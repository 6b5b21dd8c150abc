"""Every adapter through the scripts as a user calls them: prepare, train, go on, merge."""

import pytest
import torch

from src.adapters.layer_profile import BLOCK_MODES
from src.checkpoint.io import load_checkpoint
from tests.cli.conftest import words_of


@pytest.mark.parametrize(("peft", "quantized"), [("lora", True), *(
    pytest.param(peft, quantized, marks=pytest.mark.slow) for peft in BLOCK_MODES for quantized in (False, True)
    if (peft, quantized) != ("lora", True))])
def test_prepare_train_and_merge(call, good, tmp_path, peft, quantized):
    save, run, merged = tmp_path / "pairs.save", tmp_path / "run", tmp_path / "out" / "merged.pth"
    prepare = {"--output_save": str(save), "--peft": peft, "--lora_r": "4", "--strategy": f"cpu fp32{'nf4' if quantized else ''}"}
    code, err = call("rlhf_dpo_generate_save", words_of(good("rlhf_dpo_generate_save") | prepare))
    assert code == 0, err
    train = {"--rlhf_train_file": str(save), "--proj_dir": str(run), "--peft": peft, "--quant": str(int(quantized))}
    code, err = call("train", words_of(good("train") | train))
    assert code == 0, err
    adapter = run / "rwkv-final.safetensors"
    code, err = call("merge", words_of(good("merge") | {"--adapter": str(adapter), "--output": str(merged)}))
    assert code == 0, err
    base, found = load_checkpoint(good("merge")["--base"]), load_checkpoint(merged)
    assert found.keys() == base.keys()
    changed = sum(not torch.equal(found[name], base[name]) for name in base)
    # Two blocks of six linear weights, or all that two blocks have, or nothing but a state.
    assert changed == {"state": 0, "full": sum(name.startswith("blocks.") for name in base)}.get(peft, 12)
    states = tmp_path / "out" / "merged.state.pth"
    assert states.exists() == (peft == "state") == ("merged.state.pth" in err)
    if peft == "state":
        assert load_checkpoint(states).keys() == {f"blocks.{layer}.att.time_state" for layer in range(2)}
    code, err = call("train", words_of(good("train") | train | {"--proj_dir": str(run) + "2", "--load_adapter": str(adapter)}))
    assert code == 0, err
