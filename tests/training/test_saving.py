"""What is checked of an adapter before it is written, which files are written when, and what is said if training diverges."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import src.training.saving as saving
from src.adapters.files import adapter_tensors, read_adapter
from src.data.packing import Text, pack_pairs, pack_texts
from src.data.token_lists import TokenPair
from src.errors import NotFinite
from src.training.saving import CheckAdapter, SaveAdapters, explain

BASE = "0123456789abcdef" * 4
TEXTS = pack_texts([Text([1, 2, 3], [True] * 3)])


def pair_batch(number: int) -> tuple:
    return pack_pairs([TokenPair([number], [6], [7])]), torch.tensor([[-1.0, -2.0]]), 0.5, []


@pytest.fixture
def trainer():
    """As callbacks see it after the seventh step, in the first of several processes that all agree with it."""
    written = []
    return SimpleNamespace(global_step=7, current_epoch=0, is_global_zero=True, written=written, save_checkpoint=written.append,
                           strategy=SimpleNamespace(reduce_boolean_decision=lambda decision: decision))


# The check


@pytest.fixture
def again(monkeypatch):
    """What is computed again, as (tokens, references, in training mode, with gradients, stance of the compiler)."""
    computed, stances = [], ["outside"]

    def stance(name: str):
        stances.append(name)
        return nullcontext()

    def losses(model, packed, references=None, objective=None):
        computed.append((packed.tokens.tolist(), references, model.training, torch.is_grad_enabled(), stances[-1]))
        return {"loss": torch.tensor([1.0])}

    monkeypatch.setattr("torch.compiler.set_stance", stance)
    monkeypatch.setattr(saving, "pair_losses", losses)
    monkeypatch.setattr(saving, "text_losses", losses)
    return computed


@pytest.mark.parametrize("compiled", [False, True])
def test_the_last_four_micro_batches_are_computed_again_with_all_of_the_adapter(module, trainer, again, compiled):
    check, trained = CheckAdapter(), module(compile=compiled)
    trained.train()
    batches = [pair_batch(number) for number in range(1, 7)]
    for batch in batches:
        check.on_train_batch_end(trainer, trained, None, batch, 0)
    check.on_train_epoch_end(trainer, trained)
    assert [tokens for tokens, *_ in again] == [batch[0].tokens.tolist() for batch in batches[2:]]
    assert all(references is batch[1] for (_, references, *_), batch in zip(again, batches[2:], strict=True))
    assert {one[2:] for one in again} == {(False, False, "force_eager" if compiled else "default")}
    assert trained.model.training
    check.on_train_batch_end(trainer, trained, None, (TEXTS, None, 1.0), 0)
    check.on_train_epoch_end(trainer, trained)
    assert again[-1][0] == TEXTS.tokens.tolist() and len(again) == 8


def test_without_micro_batches_the_values_alone_are_checked(module, trainer):
    CheckAdapter().on_train_epoch_end(trainer, module())


def test_an_adapter_with_values_that_are_not_finite_is_refused_by_name(module, trainer, again):
    trained = module()
    next(iter(adapter_tensors(trained.model).values())).data.view(-1)[0] = math.nan
    check = CheckAdapter()
    check.on_train_batch_end(trainer, trained, None, pair_batch(1), 0)
    with pytest.raises(NotFinite, match=r"step 7: after it, the trained blocks\.0\.\S+ \(1 of \d+ values\) are not finite"):
        check.on_train_epoch_end(trainer, trained)
    assert not again


def test_one_micro_batch_without_a_loss_is_enough(module, trainer, monkeypatch):
    monkeypatch.setattr(saving, "pair_losses", lambda model, packed, *_: {
        "loss": torch.tensor([1.0]), "margin": torch.tensor([math.nan if packed.tokens[0] == 2 else 1.0])})
    check, trained = CheckAdapter(), module()
    for number in (1, 2, 3):
        check.on_train_batch_end(trainer, trained, None, pair_batch(number), 0)
    with pytest.raises(NotFinite, match="step 7: after it, the loss of the last micro-batches is not finite"):
        check.on_train_epoch_end(trainer, trained)


def test_a_process_stops_with_another_that_found_something(module, trainer):
    trainer.strategy.reduce_boolean_decision = lambda decision: False
    with pytest.raises(NotFinite, match="step 7: another device found numbers"):
        CheckAdapter().on_train_epoch_end(trainer, module())


def test_parts_of_parameters_are_gathered_first(module, trainer, tmp_path, monkeypatch):
    """Under DeepSpeed's stage 3, whose parameters carry an id."""
    gathered = []
    monkeypatch.setattr("deepspeed.zero.GatheredParameters", lambda parameters: gathered.append(parameters) or nullcontext())
    trained = module()
    CheckAdapter().on_train_epoch_end(trainer, trained)
    assert not gathered
    for parameter in trained.model.parameters():
        parameter.ds_id = 1
    CheckAdapter().on_train_epoch_end(trainer, trained)
    SaveAdapters(tmp_path, BASE, {}).on_train_end(trainer, trained)
    expected = {id(parameter) for parameter in trained.model.parameters() if parameter.requires_grad}
    assert [{*map(id, parameters)} for parameters in gathered] == [expected, expected]


# The files


@pytest.fixture
def synced(monkeypatch, trainer):
    """How many checkpoints there were when the lines were synced."""
    counts = []
    monkeypatch.setattr(saving, "sync_lines", lambda folder: counts.append(len(trainer.written)))
    return counts


def epochs(save: SaveAdapters, trainer, trained, numbers) -> None:
    for number in numbers:
        trainer.current_epoch, trainer.global_step = number, 10 * (number + 1)
        save.on_train_epoch_end(trainer, trained)


def test_every_second_epoch_and_the_last_are_written_and_named_by_all_that_came_before(module, trainer, tmp_path, synced):
    trained = module(epoch_begin=5, epoch_save=2, epoch_count=5)
    lines = SimpleNamespace(path=tmp_path / "eval.jsonl", steps=[0, 10])
    save = SaveAdapters(tmp_path, BASE, {"loss": "dpo"}, [lines])
    assert save.state_dict() == {"good": []}
    epochs(save, trainer, trained, range(5))
    names = ["rwkv-7.safetensors", "rwkv-9.safetensors", "rwkv-10.safetensors"]
    assert save.good == names and sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert trainer.written == [tmp_path / "last.ckpt"] * 3 and synced == [0, 1, 2]
    kept: dict = {}
    save.on_save_checkpoint(trainer, trained, kept)
    assert kept == {"record": {"step": 50, "lines": {"eval.jsonl": [0, 10]}}}
    save.on_train_end(trainer, trained)
    final = (tmp_path / "rwkv-final.safetensors").stat()
    save.on_fit_end(trainer, trained)
    assert (tmp_path / "rwkv-final.safetensors").stat() == final  # written once
    assert save.good == [*names, "rwkv-final.safetensors"]
    for name, step in zip(save.good, (20, 40, 50, 50), strict=True):
        adapter = read_adapter(tmp_path / name)
        assert adapter.extra == {"loss": "dpo", "step": step} and adapter.base_fingerprint == BASE
    after = SaveAdapters(tmp_path, BASE, {})
    after.load_state_dict(save.state_dict())
    assert after.good == save.good and after.good is not save.good


def test_a_resume_with_nothing_left_to_train_writes_the_last_files_again(module, trainer, tmp_path, synced):
    save = SaveAdapters(tmp_path, BASE, {})
    save.load_state_dict({"good": ["rwkv-7.safetensors", "rwkv-6.safetensors"]})
    save.on_fit_end(trainer, module(epoch_begin=5, epoch_count=2))
    assert save.good == ["rwkv-6.safetensors", "rwkv-7.safetensors", "rwkv-final.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == save.good[1:]
    assert not trainer.written and not synced


def test_other_processes_take_part_in_the_checkpoint_and_write_nothing_else(module, trainer, tmp_path, synced):
    trainer.is_global_zero = False
    save = SaveAdapters(tmp_path, BASE, {})
    epochs(save, trainer, module(epoch_count=1), [0])
    assert save.good == ["rwkv-1.safetensors"] and not list(tmp_path.iterdir())
    assert trainer.written == [tmp_path / "last.ckpt"] and not synced


# The message


@pytest.fixture
def explained(config, tmp_path):
    """`explained(step, good, there, **flags)`: the message of a run in whose folder some of its files are there."""
    def explained(step: int, good: list[str], there: list[str], **flags) -> str:
        for name in there:
            (tmp_path / name).touch()
        run = config(proj_dir=str(tmp_path), rlhf_train_file="pairs.save", **flags)
        return str(explain(NotFinite("step 9: numbers"), step, good, run))

    return explained


def test_before_the_first_step_the_files_are_to_blame(explained):
    said = explained(0, [], [], load_model="a.pth", load_adapter="b.safetensors", precision="bf16")
    assert "check a.pth and b.safetensors and the data, or use --precision fp32" in said and "--lr_init" not in said
    said = explained(0, [], [], load_model="a.pth", precision="fp32")
    assert said.endswith("check a.pth and the data")


def test_later_the_rates_are_and_good_adapters_are_named(explained, tmp_path):
    said = explained(9, ["rwkv-1.safetensors"], [])
    assert "no checked adapter was saved" in said and "--lr_init" in said and "--load_adapter" not in said
    names = [f"rwkv-{number}.safetensors" for number in range(1, 7)]
    said = explained(9, names[:5], names[:5])
    assert f"good in {tmp_path}: {', '.join(names[:5])}. Check" in said and "--resume" not in said
    assert f"--load_adapter {tmp_path / names[4]} continues" in said
    said = explained(9, names, [*names, "last.ckpt"])
    assert f": 1 earlier ones, {', '.join(names[1:])}. --resume 1 would repeat it from last.ckpt" in said
