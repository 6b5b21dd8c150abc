"""`--sft 1`: the loss and its gradients against cross-entropy written out, and whole runs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from src.adapters.apply import apply_layer_profile
from src.adapters.files import merge_adapter, read_adapter
from src.adapters.layer_profile import LayerSetting, auto_layer_profile
from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.data.packing import Text, pack_texts
from src.errors import UserError
from src.evaluation.held_out import evaluate_texts
from src.model import build_model
from src.preference.objective import text_losses
from src.training.run import train
from tests.settings import changed
from tests.training.outside import lines
from tests.training.test_run import numbers, stop_in_the_second_epoch

GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [Text(torch.randint(256, (n,), generator=GENERATOR).tolist(), (torch.rand(n, generator=GENERATOR) < 0.5).tolist())
         for n in (40, 2, 17, 90, 33)]
FULL = [LayerSetting(layer, "full", weight_lr_init=1e-3, weight_lr_final=1e-4) for layer in ("emb", "0", "1", "head")]


def trainable(path, dtype, settings):
    weights = load_checkpoint(path)
    model = build_model(weights, read_dimensions(weights, str(path)), dtype)
    apply_layer_profile(model, settings, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        if dtype == torch.float64:
            parameter.data = parameter.data.double()
    return model, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("settings", [auto_layer_profile(2, 1e-3, 1e-4, rank=4, alpha=8.0), FULL], ids=["lora", "full"])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_loss_and_gradients_equal_cross_entropy_of_each_text_alone_in_float64(material, version, settings, grad_cp):
    exact, leaves = trainable(material / f"{version}.pth", torch.float64, settings)
    total, count = 0.0, 0
    for tokens, trained in TEXTS:
        logits = exact.logits(exact(torch.tensor(tokens[:-1]))[0])
        marked = torch.tensor(trained[1:])
        total = total + F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")[marked].sum()
        count += sum(trained[1:])
    expected = total / count
    gradients = torch.autograd.grad(expected, list(leaves.values()))

    model, leaves = trainable(material / f"{version}.pth", torch.float32, settings)
    losses = text_losses(model, pack_texts(TEXTS), grad_cp)
    loss = losses["loss"].mean()
    loss.backward()
    assert len(losses["loss"]) == len(losses["sft_loss"]) == count
    # Float32 carries 1e-7; sums over a hundred tokens of a random model lose two digits of it.
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert (leaf.grad - gradient).norm() < 1e-4 * gradient.norm(), name
    found = evaluate_texts(model, TEXTS)
    assert (found["tokens"], found["texts"]) == (count, 5) and abs(found["loss"] - expected.item()) < 1e-5 * expected.item()


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_no_gradient_crosses_a_border(material, version):
    """What a text's loss says about the embeddings is about its own tokens alone; the second text has none of the first's."""
    model, leaves = trainable(material / f"{version}.pth", torch.float32, FULL)
    first, second = Text(list(range(1, 31)), [True] * 30), Text(list(range(101, 131)), [True] * 30)
    losses = text_losses(model, pack_texts([first, second]))["loss"]
    assert len(losses) == 58
    losses[29:].sum().backward()
    touched = leaves["emb.weight"].grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == list(range(101, 130))


@pytest.fixture
def answers(tmp_path) -> Path:
    """A dozen questions and answers, four more held out."""
    for name, numbers_ in (("train", range(12)), ("held_out", range(12, 16))):
        records = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in numbers_]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


@pytest.fixture
def sft(config, answers):
    def make(**changes):
        return changed(config(), **dict(
            rlhf_train_file=None, sft=True, train_data_file=str(answers / "train.jsonl"),
            eval_file=str(answers / "held_out.jsonl"), rlhf_max_corpus_len=100, lr_init=1e-2, lr_final=1e-3, epoch_steps=10,
            micro_bsz=4, **changes))

    return make


def test_a_run_learns_its_answers_and_merges(sft, answers, tmp_path):
    run = sft(accumulate_grad_batches=2)
    train(run, {})
    folder = Path(run.run.proj_dir)
    metrics, held_out = lines(folder / "metrics.jsonl"), lines(folder / "eval.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 11)) and [line["step"] for line in held_out] == [0, 5, 10]
    assert {"loss", "sft_loss", "lr", "grad_norm", "tokens_per_s"} <= set(metrics[0]) and "margin" not in metrics[0]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"] and held_out[-1]["loss"] < 0.7 * held_out[0]["loss"]
    assert held_out[0]["texts"] == 4 and held_out[0]["tokens"] == sum(len(f" It is {2 * n}.\n\n") for n in range(12, 16))
    page = (folder / "report.html").read_text()
    assert "next-token prediction" in page and "12 texts of 12 rows" in page and "Held-out texts" in page and "DPO" not in page
    assert (folder / "curves.png").exists() and read_adapter(folder / "rwkv-final.safetensors").extra["step"] == 10

    base = load_checkpoint(run.model.load_model)
    merged = merge_adapter(base, folder / "rwkv-final.safetensors")
    from src.data.examples import read_texts
    from src.tokenizer import load_tokenizer

    texts, _ = read_texts(answers / "held_out.jsonl", load_tokenizer("bytes"), 100, run.run.seed, False)
    after = evaluate_texts(build_model(merged, read_dimensions(merged, "merged")), texts)
    assert abs(after["loss"] - held_out[-1]["loss"]) < 1e-4 * after["loss"]


def test_pretraining_in_full_from_a_text_file_by_tokens(sft, answers):
    (answers / "corpus.txt").write_text("\0".join(f"The number {n} comes after {n - 1}. " * (1 + n % 3) for n in range(1, 30)))
    (answers / "full.csv").write_text("Layer,Mode,Weight_lr_init,Weight_lr_final\n" + "".join(
        f"{layer},full,1e-2,1e-3\n" for layer in ("emb", "0", "1", "head")))
    run = sft(batch_tokens=256)
    corpus = str(answers / "corpus.txt")
    run = changed(run, train_data_file=corpus, eval_file=corpus, epoch_steps=0, epoch_count=3,
                  layer_profile=str(answers / "full.csv"), rlhf_max_corpus_len=50)
    train(run, {})
    held_out = lines(Path(run.run.proj_dir) / "eval.jsonl")
    assert held_out[-1]["loss"] < 0.6 * held_out[0]["loss"]
    weights = read_adapter(Path(run.run.proj_dir) / "rwkv-final.safetensors").weights
    assert {"emb.weight", "head.weight", "ln_out.bias", "blocks.1.att.v0"} <= set(weights)


def test_a_resumed_run_gives_the_numbers_of_an_unbroken_one(sft, tmp_path, monkeypatch):
    unbroken = sft(batch_tokens=0, proj_dir=str(tmp_path / "unbroken"))
    train(unbroken, {})
    broken = changed(unbroken, proj_dir=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr("src.training.saving.SaveAdapters.on_train_batch_end", stop_in_the_second_epoch, raising=False)
        with pytest.raises(ConnectionError):
            train(broken, {})
    train(changed(broken, resume=True), {})
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert numbers(tmp_path / "broken" / name) == numbers(tmp_path / "unbroken" / name)
    one, other = (read_adapter(tmp_path / name / "rwkv-final.safetensors").weights for name in ("unbroken", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (Path(broken.data.train_data_file)).write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(UserError, match="rlhf_train_sha256 was"):
        train(changed(broken, resume=True), {})


def test_the_scripts_flags(answers, material, tmp_path):
    import train as script

    flags = {"--load_model": material / "x070.pth", "--sft": 1, "--train_data_file": answers / "train.jsonl",
             "--proj_dir": tmp_path / "run", "--accelerator": "cpu", "--precision": "fp32", "--epoch_steps": 2, "--ctx_len": 128,
             "--lora_r": 4, "--sft_on_prompt": 1}
    script.main([str(word) for pair in flags.items() for word in pair])
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2
    for changes, words in (({"--train_data_file": None}, "--train_data_file is needed with --sft 1"),
                           ({"--rlhf_train_file": "a.save"}, "--rlhf_train_file is not used with --sft 1"),
                           ({"--sft": 0}, "--train_data_file is not used with --sft 0"),
                           ({"--sft": 0, "--train_data_file": None}, "--rlhf_train_file is needed with --sft 0"),
                           ({"--train_data_file": tmp_path / "none.jsonl"}, "none.jsonl does not exist"),
                           ({"--orpo": 1}, "--sft 1 and --orpo 1 contradict"),
                           ({"--tokenizer": "world"}, "--tokenizer world")):
        given = flags | {"--proj_dir": tmp_path / "other"} | changes
        with pytest.raises(UserError, match=words):
            script.main([str(word) for pair in given.items() if pair[1] is not None for word in pair])
    assert not (tmp_path / "other").exists()
