"""The Lightning module by itself: what of a step's loss it gives, what it keeps for a resume, and who takes the steps."""

import math
from types import SimpleNamespace

import pytest
import torch

import src.training.module as module_file
from src.adapters.files import adapter_tensors
from src.data.packing import Text, pack_pairs, pack_texts
from src.data.token_lists import TokenPair
from src.preference.entries import Pair
from src.preference.kto import pack_mismatched
from src.training.batches import collate
from src.training.module import objective_of, recorded_objective

PAIRS = [TokenPair(list(range(1, 30)), list(range(30, 60)), list(range(60, 80))), TokenPair([5], [6], [7])]
TEXTS = [Text(list(range(1, 80)), [True] * 79)]


def batch_of(items: list, share: float) -> tuple:
    packed, references = (pack_texts(items), None) if isinstance(items[0], Text) else (pack_pairs(items), torch.zeros(2, 2))
    return packed, references, share, []


@pytest.mark.parametrize("items", [PAIRS, TEXTS])
def test_lightnings_averages_over_micro_batches_and_processes_leave_the_steps_mean(module, items):
    """It divides each loss by the first number, and averages gradients over the second: the step's loss is share * sum."""
    whole = module().training_step(batch_of(items, 1.0), 0).item()
    part = module(processes=3, accumulate=4).training_step(batch_of(items, 0.25), 0).item()
    assert part / 4 / 3 == pytest.approx(whole / 4)


def test_the_tokens_of_ktos_kl_count(module):
    """Of the micro-batches that are part of the step; one with share 0 only keeps the process busy."""
    run = module(loss="kto", kto_beta=0.1)
    run.trainer.strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
    thumb = Pair([1, 2, 3], [4, 5], [], -1.0, 0.0, kl=[6, 7, 8, 9], kl_base_prob=-2.0)
    packed, references = collate([thumb])
    ahead = [(*pack_mismatched([thumb, thumb._replace(kl=[6])]), 0.5), (*pack_mismatched([thumb]), 0.0)]
    counted = {}
    for number, before in enumerate((ahead, [])):
        run.training_step((packed, references, 1.0, before), 0)
        counted[number] = run.last_tokens
    # Inputs: all tokens but an answer's last, which nothing follows; a shared prompt once.
    assert counted == {0: (3 + 1) + (3 + 3 + 0), 1: 3 + 1}


@pytest.mark.parametrize("items", [PAIRS, TEXTS])
def test_grad_cp_keeps_less_for_the_backward(module, items):
    def kept(grad_cp: bool) -> int:
        step, sizes = module(grad_cp=grad_cp), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            step.training_step(batch_of(items, 1.0), 0)
        return sum(sizes)

    assert kept(grad_cp=True) < 0.6 * kept(grad_cp=False)


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_resumed_run_draws_the_random_numbers_of_an_unbroken_one(module, monkeypatch, gpus):
    """The CPU's and each GPU's; a run on the CPU can resume what a GPU began, and the reverse."""
    states, given = [torch.tensor([n], dtype=torch.uint8) for n in range(gpus)], []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: states)
    monkeypatch.setattr("torch.cuda.set_rng_state_all", given.append)
    before, checkpoint = module(), {"state_dict": {}}
    torch.manual_seed(3)
    before.on_save_checkpoint(checkpoint)
    drawn = torch.rand(4)
    for there in (gpus > 0, not gpus):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        given.clear()
        torch.manual_seed(4)
        after = module()
        after.on_load_checkpoint(checkpoint)
        after.on_train_start()
        assert torch.equal(torch.rand(4), drawn)
        assert given == ([states] if gpus and there else [])
    torch.manual_seed(5)
    fresh = torch.rand(4)
    torch.manual_seed(5)
    module().on_train_start()
    assert torch.equal(torch.rand(4), fresh)


class OnTheCpu(torch.optim.AdamW):
    """In place of DeepSpeed's, which has to be compiled first, and which by itself is Adam with an L2 penalty."""

    def __init__(self, groups, adamw_mode: bool = False, **more):
        assert adamw_mode
        super().__init__(groups, **more)


class EightBit(torch.optim.AdamW):
    """In place of bitsandbytes'."""


@pytest.mark.parametrize("strategy, optim, kind", [
    ("auto", "adamw", torch.optim.AdamW), ("ddp", "adamw", torch.optim.AdamW), ("auto", "adamw_8bit", EightBit),
    ("deepspeed_stage_2", "adamw", torch.optim.AdamW), ("deepspeed_stage_2", "adamw_8bit", EightBit),
    ("deepspeed_stage_2_offload", "adamw", OnTheCpu), ("deepspeed_stage_3_offload", "adamw", OnTheCpu),
])
def test_who_takes_the_steps(module, monkeypatch, strategy, optim, kind):
    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", OnTheCpu)
    monkeypatch.setattr(module_file, "load_bitsandbytes", lambda *_: SimpleNamespace(optim=SimpleNamespace(AdamW8bit=EightBit)))
    run = module(strategy=strategy, optim=optim, beta1=0.8, beta2=0.7, adam_eps=1e-5)
    optimizer = run.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind and optimizer.defaults["fused"] in (None, kind is torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.7) and optimizer.defaults["eps"] == 1e-5


def test_the_rates_of_each_step_are_the_schedules(module):
    """From the first step on, and a step, not an epoch, at a time."""
    made = module(warmup_steps=2).configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert schedule["interval"] == "step"
    rates = []
    for _ in range(3):
        rates += {group["lr"] for group in optimizer.param_groups}
        optimizer.step()
        schedule["scheduler"].step()
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(3)]
    assert rates == pytest.approx([cosine[0] / 3, cosine[1] * 2 / 3, cosine[2]])


def test_a_checkpoint_has_the_adapters_tensors_alone(module):
    run = module()
    checkpoint = {"state_dict": run.state_dict()}
    run.on_save_checkpoint(checkpoint)
    kept = {f"model.{name}" for name in adapter_tensors(run.model)}
    assert checkpoint["state_dict"].keys() == kept < run.state_dict().keys()


FLAGS = {"dpo_beta": 0.31, "dpo_alpha": 0.32, "label_smoothing": 0.33, "simpo_beta": 0.34, "simpo_gamma": 0.35,
         "simpo_alpha": 0.36, "orpo_alpha": 0.37, "cpo_beta": 0.38, "cpo_alpha": 0.39, "kto_beta": 0.4,
         "kto_desirable_weight": 0.41, "kto_undesirable_weight": 0.42, "kto_alpha": 0.43}


@pytest.mark.parametrize("loss, beta, alpha, more", [
    ("dpo", 0.31, 0.32, {"label_smoothing": 0.33}), ("ipo", 0.31, 0.32, {}), ("hinge", 0.31, 0.32, {}),
    ("robust", 0.31, 0.32, {"label_smoothing": 0.33}), ("simpo", 0.34, 0.36, {"gamma": 0.35, "label_smoothing": 0.33}),
    ("orpo", 0.37, 1.0, {}), ("cpo", 0.38, 0.39, {"label_smoothing": 0.33}),
    ("kto", 0.4, 0.43, {"desirable_weight": 0.41, "undesirable_weight": 0.42}),
])
def test_a_losss_flags_are_its_numbers(config, loss, beta, alpha, more):
    """ORPO's loss is the NLL of the chosen answer plus lambda times the odds ratio's (arXiv:2403.07691, equation 6)."""
    settings = config(rlhf_train_file="pairs.save", loss=loss, sft_on_prompt=True, **FLAGS).objective
    found = objective_of(settings)
    assert (found.loss, found.alpha, found.sft_on_prompt, dict(found.numbers)) == (loss, alpha, True, {"beta": beta, **more})
    told = recorded_objective(settings)
    of_the_loss = {beta, *more.values(), *({alpha} - {1.0})}
    assert told == {"loss": loss} | {name: value for name, value in FLAGS.items() if value in of_the_loss}


def test_sft_has_no_flags_of_a_loss(config):
    assert recorded_objective(config(rlhf_train_file="pairs.save", sft=True).objective) == {"loss": "sft"}
