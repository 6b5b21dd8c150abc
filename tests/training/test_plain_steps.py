"""The first steps of real runs of train.py, from files to files, against the same steps by hand in float64.

Compared is what metrics.jsonl tells of each step, and the adapter after the last. Every flag that changes a number stands in some
case at another value than its default.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.plain_model import log_probs
from tests.training.outside import changed_adapter, lines, run
from tests.training.plain_steps import PlainRun, pair_numbers, text_numbers

PAIRS = 5
WHOLE = [PAIRS] * 3
STILL = {"lr_init": 0, "lr_final": 0, "lr_advanced": 0, "epoch_count": 1, "epoch_steps": 1}
# Three steps, each of all pairs; every update is well above what rounds.
USUAL = {"accelerator": "cpu", "samples": 0, "epoch_steps": 3, "epoch_count": 1, "micro_bsz": PAIRS,
         "lora_r": 4, "lora_alpha": 12.0, "lr_init": 0.02, "lr_final": 0.005, "adam_eps": 0.002, "gradient_clip_val": 0.0,
         "dpo_beta": 0.3, "dpo_alpha": 0.2}
NO_DPO = {"dpo_beta": None, "dpo_alpha": None}
PROFILE = """Layer,Mode,Rank,Alpha,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts,FullParts
emb,full,,,0.003,0.002,0.7,,,,
0,lora,4,12,0.02,0.01,0.9,,,att.key,"ln1,att.ln_x"
1,state,,,0.01,0.001,0.9,0.05,0.002,,
head,dora,4,12,0.015,0.03,0.5,,,,
"""


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """`model(version)` -> a random checkpoint's file, and its tensors in float64."""
    def model(version: str = "x070") -> tuple[Path, dict[str, Tensor]]:
        path = tiny_checkpoints(version, "random", 16)
        return path, {name: tensor.double() for name, tensor in torch.load(path, weights_only=True).items()}

    return model


def some_pairs(base: dict[str, Tensor], alike: bool = False) -> list[tuple]:
    """Pairs of unequal lengths, or all alike, whose references are off the model's own log-probabilities, each by other nats."""
    draw, pairs = random.Random(1), []
    for number in range(PAIRS):
        lengths = (2, 10, 10) if alike else (3 + number % 2, 4 + number, 7 - number)
        prompt, chosen, reject = ([draw.randrange(1, 256) for _ in range(length)] for length in lengths)
        c, r = (log_probs(base, prompt + answer)[len(prompt) - 1:].sum().item() for answer in (chosen, reject))
        pairs.append((prompt, chosen, reject, c + 2.5 - 1.4 * number, r + 0.7 * number))
    return pairs


def elsewhere(name: str, tensor: Tensor) -> Tensor:
    """From where no gradient is 0, as half of an adapter's are at its start."""
    return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))


def rows_of(flags: dict) -> dict[str, dict[str, float]]:
    """The layer profile's, without its rates under --lr_advanced 0; `auto` has none, and a weight decay of 0.01."""
    if "layer_profile" not in flags:
        return {layer: {"Weight_decay": 0.01} for layer in "01"}
    titles, *rows = (line.split(",") for line in Path(flags["layer_profile"]).read_text().splitlines())
    read = [{title: float(cell) for title, cell in zip(titles[2:9], row[2:9], strict=True) if cell} for row in rows]
    kept = [{title: x for title, x in row.items() if "_lr_" not in title or flags.get("lr_advanced", 1)} for row in read]
    return dict(zip((row[0] for row in rows), kept, strict=True))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[[dict], tuple[Path | None, dict[str, Tensor]]]:
    """`start(flags)` -> an adapter file to go on from, None in mode full, and its tensors; made once for a base and profile."""
    made: dict[tuple, tuple] = {}

    def start(flags: dict) -> tuple[Path | None, dict[str, Tensor]]:
        names = ("load_model", "layer_profile", "peft", "lora_r", "lora_alpha")
        key = tuple(Path(flags[name]).read_text() if name == "layer_profile" else flags[name] for name in names if name in flags)
        if key not in made:
            folder = tmp_path_factory.mktemp("start")
            _, content = run(folder / "still", flags | STILL)
            if flags.get("peft") != "full":
                content = changed_adapter(folder / "still" / "rwkv-final.safetensors", folder / "start.safetensors", elsewhere)
            made[key] = folder / "start.safetensors" if flags.get("peft") != "full" else None, content
        return made[key]

    return start


@pytest.fixture
def check(model, start, tmp_path):
    """`check(version, flags, sizes, examples)`: a run whose steps have so many pairs (texts) each, against the steps by hand.

    The steps are whole passes over them. Where micro-batches of several sizes stand in an order of the run's own, `sizes` has the
    possible ones of each step.
    """

    def check(version: str, flags: dict, sizes: list[int | tuple[int, ...]], examples: list | None = None) -> None:
        path, base = model(version)
        flags = {name: value for name, value in (USUAL | {"load_model": path} | flags).items() if value is not None}
        examples = examples or some_pairs(base)
        if "sft" not in flags:
            flags["rlhf_train_file"] = tmp_path / "pairs.save"
            torch.save(examples, tmp_path / "pairs.save")
        file, before = start(flags)
        told, after = run(tmp_path / "run", flags | ({"load_adapter": file} if file else {}))

        numbers = text_numbers if "sft" in flags else pair_numbers
        plain = PlainRun(base, before, examples, numbers, flags, rows_of(flags), len(sizes))
        at_start = plain.held_out() if "eval_file" in flags else {}
        assert len(told) == len(sizes)
        for line, size in zip(told, sizes, strict=True):
            # Sums of up to 80 nats carry 1e-5 in float32, and IPO squares what is left of them.
            expected = plain.step(line, size if isinstance(size, tuple) else (size,))
            assert line == pytest.approx(line | expected, rel=1e-4, abs=1e-4)
        assert len(plain.left) == len(examples)
        if "eval_file" in flags:
            for line, expected in zip(lines(tmp_path / "run" / "eval.jsonl"), (at_start, plain.held_out()), strict=True):
                assert line == pytest.approx(line | expected, rel=1e-4, abs=1e-4)
        assert after.keys() == plain.trained.keys()
        for name, tensor in after.items():
            way, expected = tensor.double() - before[name], plain.trained[name] - before[name]
            # Rounding of weights is 1e-6 of three steps; that of gradients 1e-5, as adam_eps lets it grow no further.
            assert (way - expected).norm() <= 2e-4 * expected.norm(), name

    return check


# Each loss, all of its numbers at others than their defaults and unlike each other.
@pytest.mark.parametrize("flags", [
    {"dpo_beta": 0.3, "dpo_alpha": 0.2},
    {"loss": "dpo", "dpo_beta": 0.05, "dpo_alpha": 0.7, "label_smoothing": 0.2, "sft_on_prompt": 1},
    {"loss": "ipo", "dpo_beta": 0.4, "dpo_alpha": 0.3},
    {"loss": "hinge", "dpo_beta": 0.35, "dpo_alpha": 0.15},
    {"loss": "robust", "dpo_beta": 0.25, "dpo_alpha": 0.35, "label_smoothing": 0.15},
    {"loss": "simpo", "simpo_beta": 3.5, "simpo_gamma": 0.6, "simpo_alpha": 0.25},
    {"loss": "simpo", "simpo_beta": 1.5, "simpo_gamma": 1.7, "simpo_alpha": 0.45, "label_smoothing": 0.1, "sft_on_prompt": 1},
    {"loss": "orpo", "orpo_alpha": 0.6},
    {"loss": "orpo", "orpo_alpha": 0.35, "sft_on_prompt": 1},
    {"loss": "cpo", "cpo_beta": 0.25, "cpo_alpha": 0.55},
    {"loss": "cpo", "cpo_beta": 0.15, "cpo_alpha": 0.4, "label_smoothing": 0.3, "sft_on_prompt": 1},
], ids=lambda flags: " ".join(map(str, flags.values())))
def test_losses(check, tmp_path, flags):
    without = NO_DPO if flags.get("loss") in ("simpo", "orpo", "cpo") else {}
    check("x070", without | flags | {"eval_file": tmp_path / "pairs.save"}, WHOLE)


@pytest.mark.parametrize("flags", [
    {"beta1": 0.5}, {"beta2": 0.6}, {"adam_eps": 0.03}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 50.0},
    {"lr_init": 0.05, "lr_final": 0.001}, {"lr_init": 0.003, "lr_final": 0.03}, {"warmup_steps": 2}, {"lora_r": 2},
    {"lora_alpha": 3.0}, {"lora_r": 8, "lora_alpha": 4.0},
], ids=lambda flags: " ".join(f"{name} {value}" for name, value in flags.items()))
def test_optimizer_and_rates(check, flags):
    check("x070", {"beta1": 0.8, "beta2": 0.9} | flags, WHOLE)


@pytest.mark.parametrize(("version", "flags"), [
    *((version, {"peft": peft}) for version in ("x060", "x070") for peft in ("lora", "dora", "pissa", "bone", "state", "full")),
    ("x060", {"peft": "bone", "lora_r": 3}), ("x070", {"peft": "lora", "grad_cp": 1}),
], ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())))
def test_modes(check, version, flags):
    check(version, flags, WHOLE)


@pytest.mark.parametrize("lr_advanced", [1, 0])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_rates_and_decay_by_layer(check, tmp_path, version, lr_advanced):
    (tmp_path / "profile.csv").write_text(PROFILE)
    check(version, {"layer_profile": tmp_path / "profile.csv", "lr_advanced": lr_advanced, "warmup_steps": 1}, WHOLE)


@pytest.mark.parametrize(("flags", "sizes"), [
    ({"micro_bsz": 1, "epoch_steps": 0}, [1, 1, 1, 1, 1]),
    ({"micro_bsz": 2, "accumulate_grad_batches": 3, "epoch_steps": 0, "epoch_count": 3}, [5, 5, 5]),
    ({"micro_bsz": 2, "accumulate_grad_batches": 2, "epoch_steps": 0, "epoch_count": 2, "gradient_clip_val": 0.1}, [4, 1, 4, 1]),
    ({"micro_bsz": 3, "accumulate_grad_batches": 4, "epoch_steps": 0, "epoch_count": 2}, [5, 5]),
    ({"micro_bsz": 1, "accumulate_grad_batches": 2, "epoch_steps": 5}, [2, 2, 1]),
], ids=lambda value: " ".join(map(str, value.values() if isinstance(value, dict) else value)))
def test_accumulation(check, flags, sizes):
    check("x070", flags, sizes)


# A pair has 20 tokens as it is laid out, or 24 were its prompt there twice: a micro-batch holds two, or three, either way.
@pytest.mark.parametrize(("batch_tokens", "accumulate", "sizes"), [(50, 1, [(1, 2)] * 3), (74, 1, [(2, 3)] * 2), (50, 3, WHOLE)])
def test_batches_by_tokens(check, model, batch_tokens, accumulate, sizes):
    flags = {"batch_tokens": batch_tokens, "micro_bsz": None, "accumulate_grad_batches": accumulate, "epoch_steps": 0}
    check("x070", flags | ({"epoch_count": 3} if sizes == WHOLE else {}), sizes, some_pairs(model()[1], alike=True))


DOCUMENTS = ["One.", "Two and two are four.", "A third, longer one than both."]
TALKS = [[("Hi.", "Hello you."), ("Why?", "So.")], [("A?", "B."), ("And then?", "C, at last.")], [("1", "2"), ("3", "4 and 5")]]


def documents() -> list[tuple[list[int], list[bool]]]:
    """Every token has a loss but the first; a document ends in end-of-text."""
    return [([*text.encode(), 0], [True] * (len(text) + 1)) for text in DOCUMENTS]


def talks(on_prompt: bool) -> list[tuple[list[int], list[bool]]]:
    """All of the assistant's turns have a loss, with the blank lines that end them; the prompts if asked for."""
    pieces = [[(part, answer) for human, assistant in talk
               for part, answer in ((f"User: {human}\n\nAssistant:", False), (f" {assistant}\n\n", True))] for talk in TALKS]
    return [(list("".join(part for part, _ in talk).encode()), [answer or on_prompt for part, answer in talk for _ in part])
            for talk in pieces]


@pytest.mark.parametrize("kind", ["documents", "talks", "talks with prompts"])
@pytest.mark.parametrize(("flags", "sizes"), [
    ({"micro_bsz": 2, "accumulate_grad_batches": 2, "epoch_count": 2}, [3, 3]),
    ({"micro_bsz": 1, "accumulate_grad_batches": 2, "epoch_count": 2}, [2, 1, 2, 1]),
], ids=["unequal", "left over"])
def test_texts(check, tmp_path, kind, flags, sizes):
    on_prompt = kind.endswith("prompts")
    rows = [{"text": text} for text in DOCUMENTS] if kind == "documents" else [
        {"messages": [{"role": role, "content": text} for turns in talk for role, text in zip(("user", "assistant"), turns,
                                                                                            strict=True)]} for talk in TALKS]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = documents() if kind == "documents" else talks(on_prompt)
    flags = NO_DPO | flags | {"sft": 1, "samples": None, "train_data_file": tmp_path / "texts.jsonl", "epoch_steps": 0}
    check("x070", flags | ({"sft_on_prompt": 1} if on_prompt else {}), sizes, texts)


@pytest.mark.parametrize("by", [{"micro_bsz": 1}, {"batch_tokens": 1}, {"micro_bsz": 2, "epoch_steps": 2}])
def test_epochs_done_before_shift_names_and_the_order_of_pairs(model, tmp_path, by):
    path, base = model()
    torch.save(some_pairs(base), tmp_path / "pairs.save")
    flags = {"load_model": path, "rlhf_train_file": tmp_path / "pairs.save", "accelerator": "cpu", "samples": 0, "lr_init": 0,
             "lr_final": 0, "epoch_steps": 0} | by
    whole, _ = run(tmp_path / "whole", flags | {"epoch_count": 4})
    part, _ = run(tmp_path / "part", flags | {"epoch_count": 2, "epoch_begin": 2})
    margins, after = ([line["margin"] for line in told] for told in (whole, part))
    # Each pair has a margin of its own, which tells it; the weights stay as they are.
    assert after == pytest.approx(margins[len(margins) // 2:], abs=1e-6)
    assert after != pytest.approx(margins[:len(after)], abs=1e-3)
    names = [{file.name for file in (tmp_path / name).glob("rwkv-*.safetensors")} - {"rwkv-final.safetensors"}
             for name in ("whole", "part")]
    assert names == [{f"rwkv-{number}.safetensors" for number in numbers} for numbers in ((1, 2, 3, 4), (3, 4))]


def test_a_margin_of_0_is_not_preferred(model, tmp_path):
    """All logits are 0 where the head is, and so is the margin of answers of one length: to the last bit."""
    path, _ = model()
    weights = torch.load(path, weights_only=True)
    torch.save(weights | {"head.weight": torch.zeros_like(weights["head.weight"])}, tmp_path / "flat.pth")
    references = (-3.0, -3.0), (-4.0, -4.0), (-5.0, -3.0)
    torch.save([([5, number], [7], [8], *both) for number, both in enumerate(references)], tmp_path / "pairs.save")
    (line,), _ = run(tmp_path / "run", {"load_model": tmp_path / "flat.pth", "rlhf_train_file": tmp_path / "pairs.save",
                                        "accelerator": "cpu", "samples": 0, "epoch_steps": 1, "micro_bsz": 3, "dpo_beta": 0.3})
    assert line["margin"] == pytest.approx(0.3 * 2 / 3)
    assert line["pref_accuracy"] == pytest.approx(1 / 3) and line["pref_percentage"] == pytest.approx(0.9 * 0.5 + 0.1 / 3)
