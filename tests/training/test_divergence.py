"""Runs whose numbers stop being finite: nothing bad is written, what is good is named, and the blame is right."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import src.training.module as module
import src.training.watching as watching
from src.adapters.layer_profile import BLOCK_MODES
from src.checkpoint.io import load_checkpoint, save_checkpoint
from src.errors import UserError
from src.generation.greedy import likeliest_answers
from src.training.run import train
from tests.adapters.test_files import rewrite
from tests.cli.conftest import snapshot
from tests.settings import changed


def diverges(run, answer=None) -> str:
    """The message of a run that must stop, once its folder was found free of numbers that are not finite."""
    with pytest.raises(UserError) as caught:
        train(run, {}, answer)
    check_folder(Path(run.run.proj_dir))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_folder(folder: Path) -> None:
    """Read by other means than the program's: no NaN or infinity in any file, no temporary left."""

    def refuse(name: str):
        raise AssertionError(f"{name} in a JSON file")

    for path in folder.iterdir():
        if path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line, parse_constant=refuse)
        elif path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=refuse)
        elif path.suffix in (".safetensors", ".pth"):
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            assert all(torch.isfinite(tensor).all() for tensor in weights.values()), path.name
        elif path.name == "last.ckpt":
            state = torch.load(path, weights_only=True)["state_dict"]
            assert all(torch.isfinite(tensor).all() for tensor in state.values())
        assert not path.name.endswith(".tmp")


def adapters(run) -> list[str]:
    return sorted(path.name for path in Path(run.run.proj_dir).glob("rwkv-*"))


@pytest.fixture
def second_epoch_diverges(config):
    """A step an epoch, the first at a usual rate and the last at one that overflows float32."""

    def make(**changes):
        return config(**dict(epoch_steps=1, epoch_count=2, lr_init=1e-3, lr_final=1e38, warmup_steps=0) | changes)

    return make


@pytest.mark.parametrize("peft", BLOCK_MODES)
def test_what_a_first_step_ruined_is_not_saved(config, peft):
    run = config(peft=peft, epoch_steps=1, epoch_count=1, lr_init=1e38, lr_final=1e38, warmup_steps=0)
    said = diverges(run)
    assert said.startswith("step 1: ") and "no checked adapter was saved" in said and "--lr_init" in said
    assert adapters(run) == [] and not (Path(run.run.proj_dir) / "last.ckpt").exists()


def test_finite_values_that_give_no_finite_loss_are_not_saved(config):
    """Weights of about 1e5 are finite, and no value in the file says that the model is gone."""
    run = config(peft="full", epoch_steps=1, epoch_count=1, lr_init=1e5, lr_final=1e5, warmup_steps=0)
    said = diverges(run)
    assert said.startswith("step 1: after it, the loss") and adapters(run) == []
    ended = changed(run, proj_dir=run.run.proj_dir + "-small", lr_init=1e-3, lr_final=1e-3)
    train(ended, {})
    assert adapters(ended) == ["rwkv-1.safetensors", "rwkv-final.safetensors"]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("peft", ["lora", "state"])
def test_the_good_epoch_stays_and_is_named_and_a_resume_diverges_again(second_epoch_diverges, prepared, peft, held_out):
    run = second_epoch_diverges(peft=peft, eval_file=str(prepared("x070")) if held_out else None)
    said = diverges(run)
    folder = Path(run.run.proj_dir)
    assert said.startswith("step 2: ") and f"checked and good in {folder}: rwkv-1.safetensors. --resume 1" in said
    assert [name for name in adapters(run) if name.endswith("safetensors")] == ["rwkv-1.safetensors"]
    assert ("rwkv-1.state.pth" in adapters(run)) == (peft == "state")
    kept = ("rwkv-1.safetensors", "rwkv-1.state.pth", "last.ckpt", "eval.jsonl")
    before = snapshot(folder)
    assert diverges(changed(run, resume=True)) == said
    after = snapshot(folder)
    assert before.keys() == after.keys() and all(before.get(name) == after.get(name) for name in kept)
    # What the message advises works, but for this test's rate, which no flag takes and no adapter may have.
    good = folder / "rwkv-1.safetensors"
    rewrite(good, None, lambda metadata: metadata.update(profile=metadata["profile"].replace("1e+38", "1")))
    elsewhere = changed(run, proj_dir=run.run.proj_dir + "-again", lr_final=1e-3, load_adapter=str(good))
    train(elsewhere, {})
    assert "rwkv-final.safetensors" in adapters(elsewhere)


def test_an_epoch_that_is_not_saved_is_not_called_good(second_epoch_diverges):
    said = diverges(second_epoch_diverges(epoch_save=2))
    assert said.startswith("step 2: ") and "no checked adapter was saved" in said and "--resume" not in said


def test_texts_too(second_epoch_diverges, tmp_path):
    records = [{"text": f"The number {n} comes after {n - 1}."} for n in range(9)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    run = changed(second_epoch_diverges(), rlhf_train_file=None, sft=True, train_data_file=str(tmp_path / "texts.jsonl"),
                  eval_file=str(tmp_path / "texts.jsonl"))
    assert "checked and good in" in diverges(run) and adapters(run) == ["rwkv-1.safetensors"]


def test_held_out_pairs_alone_may_tell(config, prepared, monkeypatch, capsys):
    evaluate, calls = watching.evaluate_pairs, []

    def at_last_without_numbers(*given):
        calls.append(evaluate(*given))
        return calls[-1] | ({"loss": math.nan, "margin": -math.inf} if len(calls) == 3 else {})

    monkeypatch.setattr(watching, "evaluate_pairs", at_last_without_numbers)
    run = config(eval_file=str(prepared("x070")), samples=1)
    said = diverges(run, likeliest_answers)
    assert said.startswith("step 8: held out, loss, margin are not finite") and "good in" in said
    assert adapters(run) == ["rwkv-1.safetensors"]
    for name in ("eval", "samples"):
        written = (Path(run.run.proj_dir) / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in written] == [0, 4]
    err = capsys.readouterr().err
    assert "epoch 1," in err and "epoch 2," not in err and "done" not in err


def test_a_number_of_the_step_that_is_not_finite_stops_it_though_the_loss_is(config, monkeypatch):
    pair_losses, calls = module.pair_losses, []

    def loses_a_reward(*arguments, **named):
        losses = pair_losses(*arguments, **named)
        calls.append(1)
        return losses | ({"reward_chosen": losses["reward_chosen"] - math.inf} if len(calls) == 3 else {})

    monkeypatch.setattr(module, "pair_losses", loses_a_reward)
    run = config()
    said = diverges(run)
    assert said.startswith("step 3: reward_chosen is not finite")
    assert len((Path(run.run.proj_dir) / "metrics.jsonl").read_text().splitlines()) == 2


def test_with_accumulation_a_lost_loss_is_told_at_the_end_of_its_step_and_not_applied(config, monkeypatch):
    pair_losses, models, before = module.pair_losses, [], []

    def loses_the_loss(model, *arguments, **named):
        models.append(model)
        before.append({name: value.clone() for name, value in model.named_parameters() if value.requires_grad})
        losses = pair_losses(model, *arguments, **named)
        return losses | ({"loss": losses["loss"] * math.nan} if len(models) == 3 else {})

    monkeypatch.setattr(module, "pair_losses", loses_the_loss)
    said = diverges(config(accumulate_grad_batches=2))
    assert said.startswith("step 2: the loss is not finite") and len(models) == 4
    after = dict(models[-1].named_parameters())
    assert all(value.equal(after[name]) for name, value in before[-1].items())


@pytest.fixture
def broken_base(material, tmp_path) -> Path:
    """A checkpoint whose values are finite and whose logits are not."""
    weights = load_checkpoint(material / "x070.pth")
    weights["head.weight"] = torch.full_like(weights["head.weight"], 3e38)
    save_checkpoint(weights, tmp_path / "broken.pth")
    return tmp_path / "broken.pth"


@pytest.mark.parametrize("seen_by", ["held out", "samples", "loss"])
def test_before_the_first_step_the_learning_rate_is_not_to_blame(config, prepared, broken_base, seen_by):
    # A loss without references takes any base for these pairs.
    run = config(load_model=str(broken_base), loss="simpo", eval_file=str(prepared("x070")) if seen_by == "held out" else None)
    run = changed(run, samples=2 if seen_by == "samples" else 0)
    said = diverges(run, likeliest_answers)
    assert said.startswith(f"step {int(seen_by == 'loss')}: ") and seen_by.split()[0] in said
    assert str(broken_base) in said and "nothing has been trained yet" in said and "--lr_init" not in said
    assert adapters(run) == [] and not list(Path(run.run.proj_dir).glob("samples.jsonl"))


def test_a_run_broken_off_before_its_last_file_gets_it_by_a_resume(config):
    run = config(epoch_count=1)
    train(run, {})
    final = Path(run.run.proj_dir) / "rwkv-final.safetensors"
    content = final.read_bytes()
    final.unlink()
    train(changed(run, resume=True), {})
    assert final.read_bytes() == content
