"""report.html: what it holds of a run, that nothing in the data gets out of its place, and when it is written."""

import json
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from unittest.mock import ANY

import pytest

import src.training.module as module
from src.errors import Stopped, UserError
from src.evaluation.picture import MOST_POINTS, curve_svgs, read_columns, thinned
from src.evaluation.report import paired, profile_rows, write_report
from src.evaluation.samples import read_questions
from src.generation.greedy import likeliest_answers
from src.preference.entries import Pair
from src.preference.pairs import load_pairs, save_pairs
from src.training.run import train
from tests.settings import changed
from tests.stored_pairs import stored
from tests.training.outside import lines
from tests.training.test_run import numbers

HOSTILE = ("<script>alert(1)</script>", "</div><img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "{{ 7 * 7 }}{% raw %}",
           "&lt;b&gt; & 'quoted'", "</style><style>body{display:none}</style>", "javascript:alert(1)", "a\x00b\x1b[31m\ud800",
           "]]><!--", "\u202eright to left")


class Page(HTMLParser):
    """A page's elements with their attributes' names, its links of whatever kind, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.addresses, self.parts = [], [], []
        self.feed(page)
        self.close()
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, *sorted(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data):
        self.parts.append(data)


def read(folder: str | Path) -> Page:
    return Page((Path(folder) / "report.html").read_text(encoding="utf-8"))


def made_up(folder: Path, text: str) -> Page:
    """The report of a folder, the same but for a text that stands wherever a run's data can put one."""
    folder.mkdir()
    sidecar = dict.fromkeys(("base_model", "precision", "quantization", "tokenizer", "cut", "dropped"), text)
    data = {"pairs": 3, "too_long": 1, "empty_answer": 0, "sidecar": sidecar | {"templates": {text: text}}}
    config = {"load_model": text, "rlhf_train_file": text, "eval_file": text, "rlhf_max_corpus_len": 9, "precision": text,
              "quantization": text, "wandb": text, "proj_dir": text, "base_fingerprint": text, "train_data": data,
              "eval_data": data, "base": {"version": text, "n_layer": 2, "n_embd": 8, "vocab_size": 256}, "sample_tokens": 4,
              "total_steps": 2, "layer_profile_rows": [{"layer": "0", "mode": text, "reject_parts": [text]}]}
    metrics = [{"step": step, "margin": 0.5, "pref_percentage": 0.5, "elapsed_s": 1.0, "peak_memory_bytes": 1} for step in (1, 2)]
    held_out = [{"step": step, "accuracy": 0.5, text: 1.0} for step in (0, 2)]
    samples = [{"step": step, "samples": [{"prompt": text, "chosen": text, "answer": text, "complete": True}]} for step in (0, 2)]
    (folder / "config.json").write_text(json.dumps(config))
    for name, rows in (("metrics", metrics), ("eval", held_out), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rwkv-final.safetensors").touch()
    write_report(folder)
    return read(folder)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_data_becomes_part_of_the_page(tmp_path, text):
    harmless, page = made_up(tmp_path / "a", "harmless"), made_up(tmp_path / "b", text)
    assert page.elements == harmless.elements and page.addresses == harmless.addresses
    # An HTML file can't hold a lone surrogate, nor a NUL, which browsers show as U+FFFD.
    assert page.text.count(" ".join(text.replace("\ud800", "?").split())) >= harmless.text.count("harmless") - 3


@pytest.mark.usefixtures("drawn")
def test_the_page_stands_for_itself(config, prepared):
    run = config(eval_file=str(prepared("x070")), samples=2)
    train(run, {}, likeliest_answers)
    page = read(run.run.proj_dir)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base"} & {tag for tag, *_ in page.elements}
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    raw = (Path(run.run.proj_dir) / "report.html").read_text(encoding="utf-8")
    assert "://" not in raw and "@import" not in raw
    assert set(re.findall(r"url\((.)", raw)) == {"#"}
    assert len(re.findall(r"<svg ", raw)) == 6


def test_the_page_holds_the_settings_held_out_numbers_and_answers(config, prepared):
    run = config(eval_file=str(prepared("x070")), samples=2, lr_init=1e-2, dpo_beta=0.37)
    train(run, {}, likeliest_answers)
    folder, page = Path(run.run.proj_dir), read(run.run.proj_dir)
    facts = json.loads((folder / "config.json").read_text())
    for words in (run.model.load_model, facts["base_fingerprint"], run.data.rlhf_train_file,
                  "RWKV-7, 2 layers, width 64, vocabulary 256", "dpo_beta 0.37", "lr_init 0.01",
                  "12 pairs; left out 0 over 512 tokens and 0 with an empty answer",
                  "references by x070.pth in fp32; tokenizer bytes", "Finished after 8 optimizer steps",
                  f"{facts['trained_parameters']:,}", "merge.py --base"):
        assert words in page.text, words
    before, *_, after = lines(folder / "eval.jsonl")
    for name, words in (("accuracy", "ties count half)"), ("margin", "mean margin"), ("dpo_loss", "DPO loss")):
        shown = [f"{line[name]:.1%}" if name == "accuracy" else f"{line[name]:+.4f}" if name == "margin" else f"{line[name]:.4f}"
                 for line in (before, after)]
        assert f"{words} {' '.join(shown)}".replace("-", "−") in page.text
    samples = lines(folder / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 4, 8]
    pairs, _, _ = load_pairs(run.data.eval_file, 256, 512)
    for at, (first, last) in enumerate(zip(samples[0]["samples"], samples[-1]["samples"], strict=True)):
        assert first["prompt"] == bytes(pairs[at][0]).decode().strip() and first["chosen"] == bytes(pairs[at][1]).decode().strip()
        assert first["answer"] != last["answer"]
        shown = (first["prompt"], "before the first step", first["answer"], "…", "after step 8", last["answer"], "…",
                 "the chosen answer", first["chosen"])
        assert " ".join(" ".join(shown).split()) in page.text


def test_samples_change_no_number(config, tmp_path):
    profile = tmp_path / "profile.csv"  # with dropout, so that the random state matters
    profile.write_text("Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final\n"
                       "emb,freeze,,,,,\n0,lora,4,8,0.2,1e-3,1e-4\n1,full,,,,1e-3,1e-4\nhead,freeze,,,,,\n")
    for samples in (0, 3):
        train(config(layer_profile=str(profile), samples=samples, proj_dir=str(tmp_path / str(samples))), {}, likeliest_answers)
    assert numbers(tmp_path / "0" / "metrics.jsonl") == numbers(tmp_path / "3" / "metrics.jsonl")
    assert not (tmp_path / "0" / "samples.jsonl").exists()


@pytest.mark.parametrize(("precision", "quantization"), [("bf16", "nf4"), ("fp32", "int8")])
def test_samples_of_a_quantized_base(config, prepared, precision, quantization):
    run = config(precision=precision, quantization=quantization, rlhf_train_file=str(prepared("x070", precision, quantization)),
                 samples=1, grad_cp=True)
    train(run, {}, likeliest_answers)
    assert [len(line["samples"]) for line in lines(Path(run.run.proj_dir) / "samples.jsonl")] == [1, 1, 1]


@pytest.mark.parametrize("breaks_at", [3, 6])
def test_a_broken_off_run_has_a_report_and_its_continuation_the_whole_one(config, prepared, monkeypatch, breaks_at):
    run = config(eval_file=str(prepared("x070")), samples=1)
    calls, pair_losses = 0, module.pair_losses

    def interrupted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == breaks_at:
            raise Stopped(signal.SIGINT)
        return pair_losses(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, "pair_losses", interrupted)
        with pytest.raises(Stopped):
            train(run, {}, likeliest_answers)
    page = read(run.run.proj_dir)
    assert f"After {breaks_at - 1} of 8 optimizer steps" in page.text and "--resume 1" in page.text
    assert ("after step 4" in page.text) == (breaks_at > 4) and "before the first step" in page.text
    train(changed(run, resume=True), {}, likeliest_answers)
    page = read(run.run.proj_dir)
    assert "Finished after 8 optimizer steps" in page.text
    assert "before the first step" in page.text and "after step 8" in page.text
    for name in ("eval.jsonl", "samples.jsonl"):
        assert [line["step"] for line in lines(Path(run.run.proj_dir) / name)] == [0, 4, 8]


def test_ctrl_c_in_a_notebook_comes_back_as_it_went_in(config, monkeypatch):
    run, pair_losses, handler = config(), module.pair_losses, signal.getsignal(signal.SIGINT)
    calls = iter(range(9))

    def interrupted(*arguments, **named):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return pair_losses(*arguments, **named)

    monkeypatch.setattr(module, "pair_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run, {}, likeliest_answers)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "After 2 of 8 optimizer steps" in read(run.run.proj_dir).text


def test_a_report_that_can_not_be_written_stops_no_training(config, capsys):
    run = config()
    (Path(run.run.proj_dir) / "report.html" / "in the way").mkdir(parents=True)
    train(run, {})
    assert capsys.readouterr().err.count("warning: ") == 2  # after each epoch
    assert (Path(run.run.proj_dir) / "rwkv-final.safetensors").exists()


def test_a_damaged_folder_is_told(tmp_path):
    made_up(tmp_path / "run", "x")
    for name in ("config.json", "eval.jsonl", "samples.jsonl", "metrics.jsonl"):
        content = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(content[:-9])
        with pytest.raises(UserError, match=r"run.*damaged"):
            write_report(tmp_path / "run")
        (tmp_path / "run" / name).write_text(content)
    write_report(tmp_path / "run")


def test_questions_differ_and_need_the_pairs_own_tokenizer(prepared, capsys):
    pairs, sidecar, _ = load_pairs(prepared("x070"), 256, 512)
    questions = read_questions([pair for pair in pairs for _ in range(3)], 3, sidecar, 256)
    assert questions.tokens == [pair[0] for pair in pairs[:3]] and len({text["prompt"] for text in questions.texts}) == 3
    thumbs = [pair._replace(**empty) for pair in pairs for empty in ({"chosen": []}, {"reject": []})]
    assert read_questions(thumbs, 3, sidecar, 256) == questions._replace(tokenizer=ANY)
    assert read_questions([thumbs[0]], 3, sidecar, 256).texts == [questions.texts[0] | {"chosen": ""}]
    told = {"name": "a", "fingerprint": "", "stops": ["<|end|>"], "controls": [], "opening": "<think>", "collapses": False}
    ended = Pair(list(b"a"), list(b"b<|end|>c<|end|>\n"), [], 0.0, 0.0)
    assert read_questions([ended], 1, {"tokenizer": "bytes", "template": told}, 256).texts[0]["chosen"] == "<think>b<|end|>c"
    assert read_questions([ended], 1, {"tokenizer": "bytes", "template": told | {"stops": [""]}}, 256).ending.stops == ()
    assert read_questions([ended], 1, {"tokenizer": "bytes", "template": told | {"controls": ["<|eot|>"]}}, 256) is None
    assert read_questions(pairs, 3, {"tokenizer": "/nowhere/tokenizer.json"}, 256) is None
    assert read_questions(pairs, 3, None, 300) is None
    assert read_questions([Pair([256], [1], [2], 0.0, 0.0)], 3, {"tokenizer": "bytes"}, 300) is None
    assert capsys.readouterr().err.count("warning: no samples") == 4


def test_pairs_without_a_sidecar_are_reported_as_such(config, prepared, tmp_path):
    pairs, _, _ = load_pairs(prepared("x070"), 256, 512)
    save_pairs(tmp_path / "old.save", stored([*pairs, Pair([1], [], [2], 0.0, 0.0)]), {})
    (tmp_path / "old.save.json").unlink()
    run = config(rlhf_train_file=str(tmp_path / "old.save"), epoch_count=1, samples=1)
    train(run, {}, likeliest_answers)
    text = read(run.run.proj_dir).text
    assert "no sidecar" in text and "12 pairs; left out 0 over 512 tokens and 1 with an empty answer" in text
    assert "prompts of the training pairs" in text


def test_equal_layers_share_a_row_and_what_none_uses_is_left_out():
    layers = (("emb", "freeze", 0), ("0", "lora", 8), ("1", "lora", 8), ("2", "lora", 4), ("head", "freeze", 0))
    rows = [{"layer": name, "mode": mode, "rank": rank, "alpha": 0.0} for name, mode, rank in layers]
    assert profile_rows(rows) == [
        {"layer": "emb", "mode": "freeze", "rank": 0}, {"layer": "0 – 1", "mode": "lora", "rank": 8},
        {"layer": "2", "mode": "lora", "rank": 4}, {"layer": "head", "mode": "freeze", "rank": 0}]


def test_answers_are_paired_by_their_prompt():
    def line(step, *prompts):
        return {"step": step, "samples": [{"prompt": prompt, "answer": f"{prompt} at {step}"} for prompt in prompts]}

    found = paired([line(0, "a", "b"), line(4, "a", "b"), line(8, "b", "c")])
    assert [(sample["before"] and sample["before"]["answer"], sample["after"]["answer"]) for sample in found] == \
        [("b at 0", "b at 8"), (None, "c at 8")]
    assert paired([line(0, "a")])[0]["after"] is None
    assert paired([line(4, "a")])[0]["before"] is None and paired([]) == []


@pytest.mark.usefixtures("drawn")
def test_curves_of_a_long_run_stay_small_and_show_what_the_run_has(tmp_path):
    generator = Random(0)
    rows = [{"step": step, "lr": 1.0, "grad_norm": generator.random()} for step in range(1, 20 * MOST_POINTS + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rate, norm = curve_svgs(read_columns(tmp_path / "metrics.jsonl"), {})
    assert "learning rate" in rate and "gradient norm" in norm
    assert len(rate) + len(norm) < 100_000
    assert thinned([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
    assert thinned([1.0, 3.0] * MOST_POINTS + [5.0])[-2:] == [pytest.approx(7 / 3), pytest.approx(3.0)]
