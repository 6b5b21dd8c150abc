"""One template through all scripts: what one writes the next reads, and a difference is refused or reported."""

import csv
import json
from pathlib import Path

import pytest
import torch

from src.adapters.files import read_adapter
from src.data.load_template import model_note, recorded
from src.data.templates import CLASSIC, TEMPLATES
from src.generation import batch
from src.generation.vocabulary import answer_text
from src.tokenizer import load_tokenizer
from tests.adapters.test_files import rewrite
from tests.cli.conftest import SCRIPTS, words_of

GENERATE, PREPARE, TRAIN, MERGE, EVALUATE = SCRIPTS
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HOSTILE = {
    "raises.jinja": ("{% for m in messages %}{% if '7' in m.content %}{{ raise_exception('no sevens') }}{% endif %}"
                     "{{ m.content }}|{% endfor %}", "no sevens"),
    "loops.jinja": ("{% for m in messages %}{{ m.content }}|{% if '7' in m.content %}"
                    "{% for a in range(9999) %}"
                    "{% for b in range(9999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}", "takes over 2 s"),
    "drops.jinja": ("{% for m in messages %}{% if '14' not in m.content %}{{ m.content }}{% endif %}|{% endfor %}",
                    "is changed by"),
    "syntax.jinja": ("{% for m in messages %}{{ m.content }}", "syntax.jinja"),
    "config.json": ('{"chat_template": null}', "there is no chat_template in it"),
}


@pytest.fixture
def chatml(tmp_path) -> str:
    (tmp_path / "chat.jinja").write_text(CHATML)
    return str(tmp_path / "chat.jinja")


def rejects(path: str) -> list[str]:
    with open(path, newline="") as file:
        return [row["reject"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["g1", "g1-think", "chatml"])
def test_what_one_script_writes_the_next_reads(call, good, tmp_path, chatml, name):
    name, out = chatml if name == "chatml" else name, tmp_path / "out"
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"prompt": f"What is {n}?", "chosen": f"<think>{n}</think>\n\nIt is {n}.\n\n- so"}) + "\n" for n in range(4)))
    code, err = call(GENERATE, words_of(good(GENERATE) | {"--template": name, "--input_csv": str(tmp_path / "in.jsonl")}))
    assert code == 0, err
    written = str(out / "o.csv")
    assert all(text.startswith("<think") for text in rejects(written)) if name == "g1-think" else len(rejects(written)) == 4
    made_how = json.loads(Path(f"{written}.json").read_text())
    assert made_how["template"]["name"] == name
    assert made_how["stop"] == {"g1": ["\n\nUser:"], "g1-think": ["\n\nUser:"]}.get(name, ["<|im_end|>"])
    assert made_how["ban_end_of_text"] is (name == chatml)

    flags = good(PREPARE) | {"--template": name, "--input_csv": written, "--skip_bad_rows": "1"}
    code, err = call(PREPARE, words_of(flags))
    assert code == 0 and "warning" not in err, err
    save = str(out / "o.save")
    sidecar = json.loads(Path(f"{save}.json").read_text())
    assert sidecar["template"] == made_how["template"] and sidecar["templates"] == {name: sidecar["count"]}
    prompt, chosen, *_ = torch.load(save, weights_only=True)[0]
    begins = {"g1": "\0User: What is 0?\n\nAssistant:", "g1-think": "\0User: What is 0?\n\nAssistant: <think"}
    ends = {"g1": " <think>0</think>\n\nIt is 0.\n\n- so\0", "g1-think": ">0</think>\n\nIt is 0.\n\n- so\0"}
    asked = "<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n"
    assert bytes(prompt).decode() == begins.get(name, asked)
    assert bytes(chosen).decode() == ends.get(name, "<think>0</think>\n\nIt is 0.\n\n- so<|im_end|>\n")

    run = good(TRAIN) | {"--rlhf_train_file": save, "--samples": "1", "--sample_tokens": "2", "--template": name}
    code, err = call(TRAIN, words_of(run))
    assert code == 0, err
    sample = json.loads((out / "run" / "samples.jsonl").read_text().splitlines()[0])["samples"][0]
    assert sample["chosen"].startswith("<think>0</think>\n\nIt is 0.\n\n- so")
    assert sample["answer"].startswith("<think") is (name == "g1-think")
    config = json.loads((out / "run" / "config.json").read_text())
    assert config["template_fingerprint"] == sidecar["template"]["fingerprint"]

    adapter = str(out / "run" / "rwkv-final.safetensors")
    flags = good(EVALUATE) | {"--adapter": adapter, "--pairs": str(tmp_path / "held.jsonl")}
    row = {"prompt": "What?", "chosen": "<think>a</think>b", "rejected": "<think>c</think>"}
    (tmp_path / "held.jsonl").write_text(json.dumps(row))
    for template, warned in ((None, False), ("classic", True)):
        code, err = call(EVALUATE, words_of(flags | {"--template": template}))
        told = f"in another --template than the adapter {adapter} was trained with: {template}, not {name}\n"
        assert code == 0 and (told in err) is warned, err
    assert json.loads((out / "o.json").read_text())["template"] == recorded(CLASSIC)
    assert call(EVALUATE, words_of(good(EVALUATE) | {"--adapter": adapter, "--pairs": save}))[0] == 0
    assert json.loads((out / "o.json").read_text())["template"] == sidecar["template"]


def test_what_a_model_writes_before_its_answer_is_not_prepared_twice(call, good, tmp_path, monkeypatch):
    """A template without `add_generation_prompt` leaves `<assistant>` to the model; here the model is one that has learned it."""
    (tmp_path / "late.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So."}))
    learned = load_tokenizer("bytes").encode("<assistant>No.</s>")
    monkeypatch.setattr(batch, "answer_text", lambda tokenizer, tokens, ending: answer_text(tokenizer, learned, ending))
    more = {"--template": str(tmp_path / "late.jinja")}
    code, err = call(GENERATE, words_of(good(GENERATE) | more | {"--input_csv": str(tmp_path / "in.jsonl")}))
    assert code == 0 and "has no '<assistant>' in prompts" in err, err
    assert rejects(str(tmp_path / "out" / "o.csv")) == ["No."]
    code, err = call(PREPARE, words_of(good(PREPARE) | more | {"--input_csv": str(tmp_path / "out" / "o.csv")}))
    assert code == 0, err
    save = str(tmp_path / "out" / "o.save")
    assert [bytes(tokens).decode() for tokens in torch.load(save, weights_only=True)[0][:3]] == [
        "<user>Why?</s>\n", "<assistant>So.</s>\n", "<assistant>No.</s>\n"]
    code, err = call(TRAIN, words_of(good(TRAIN) | {"--rlhf_train_file": save, "--samples": "1", "--sample_tokens": "2"}))
    assert code == 0, err
    sample = json.loads((tmp_path / "out" / "run" / "samples.jsonl").read_text().splitlines()[0])["samples"][0]
    assert (sample["chosen"], sample["answer"]) == ("So.", "No.")


def test_another_template_than_before_is_refused_or_reported(call, good, fails, prepared, tmp_path, chatml):
    assert call(GENERATE, words_of(good(GENERATE)))[0] == 0
    made, csv_file = snapshot_of(tmp_path), str(tmp_path / "out" / "o.csv")
    code, err = call(GENERATE, words_of(good(GENERATE) | {"--template": "g1"}))
    assert code == 2 and "was started with template classic, not g1" in err and snapshot_of(tmp_path) == made
    code, err = call(PREPARE, words_of(good(PREPARE) | {"--input_csv": csv_file, "--template": "g1"}))
    assert code == 0 and "its rejects were written under --template classic, not g1" in err
    code, err = call(PREPARE, words_of(good(PREPARE) | {"--input_csv": csv_file}))
    assert code == 0 and "warning" not in err
    code, err = call(TRAIN, words_of(good(TRAIN) | {"--template": "g1"}))
    assert code == 2 and "was prepared with --template classic, not g1" in err
    code, err = call(EVALUATE, words_of(good(EVALUATE) | {"--template": "g1"}))
    assert code == 2 and "was prepared with --template classic, not g1" in err
    assert call(PREPARE, words_of(good(PREPARE) | {"--template": chatml}))[0] == 0
    held = str(tmp_path / "out" / "o.save")
    code, err = call(TRAIN, words_of(good(TRAIN) | {"--eval_file": held, "--samples": "0"}))
    assert code == 0 and f"--eval_file {held} is in another --template than the training data: {chatml}, not classic\n" in err
    adapter = str(tmp_path / "out" / "run" / "rwkv-final.safetensors")
    code, err = call(TRAIN, words_of(good(TRAIN) | {"--load_adapter": adapter, "--rlhf_train_file": held, "--samples": "0",
                                                    "--proj_dir": str(tmp_path / "next")}))
    assert code == 0 and f"than the adapter {adapter} was trained with: {chatml}, not classic\n" in err


def snapshot_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_changed_chat_template_is_another(call, good, tmp_path, chatml):
    flags = words_of(good(GENERATE) | {"--template": chatml})
    assert call(GENERATE, flags)[0] == 0
    code, err = call(GENERATE, flags)
    assert code == 0 and "nothing to do" in err
    Path(chatml).write_text(CHATML.replace("im_end", "end"))
    code, err = call(GENERATE, flags)
    assert code == 2 and f"{chatml}, which has changed since" in err


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("script", [GENERATE, PREPARE])
def test_a_template_that_fails_is_one_line_with_the_row(fails, tmp_path, script, name):
    source, words = HOSTILE[name]
    (tmp_path / name).write_text(source)
    err = fails(script, {"--template": str(tmp_path / name)}, name, words)
    if name in ("raises.jinja", "loops.jinja", "drops.jinja"):
        assert "row 8" in err  # What is 7 plus 7? It is 14.


def test_evaluating_names_all_rows_that_can_not_be_used_at_once(fails, tmp_path):
    """Those that can't be read, and those that the template can't render."""
    rows = [{"prompt": "a", "chosen": "", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "<think>c</think>d"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fails(EVALUATE, {"--pairs": tmp_path / "rows.jsonl", "--template": "g1-fakethink"}, "2 of 2 rows can't be used",
          "empty chosen answer: row 1", "answer with thinking: row 2")


@pytest.mark.parametrize("script", [GENERATE, PREPARE, TRAIN, EVALUATE])
def test_a_name_that_is_no_template(fails, script):
    fails(script, {"--template": "g2"}, "--template", "classic, g1, g1-think", "'g2'")


@pytest.mark.parametrize(("name", "noted"), [
    ("rwkv7-g1-0.1b.pth", True), ("RWKV-G1a2-2.9b.pth", True), ("rwkv7_G0a_7b.pth", True), ("rwkv7g1.pth", True),
    ("RWKV7-G1a10.pth", True), ("rwkv-g12.pth", False),
    ("big1.pth", False), ("x070.pth", False)])
def test_a_g1_model_under_classic_is_noted(call, good, material, tmp_path, name, noted):
    (tmp_path / name).write_bytes((material / "x070.pth").read_bytes())
    for script in (GENERATE, PREPARE):
        flags = good(script) | {"--load_model": str(tmp_path / name)}
        code, err = call(script, words_of(flags))
        assert code == 0 and (err.count("is a G1 model by its name") == 1) is noted
    flags = good(TRAIN) | {"--load_model": str(tmp_path / name), "--rlhf_train_file": str(tmp_path / "out" / "o.save"),
                           "--samples": "0"}
    assert (call(TRAIN, words_of(flags))[1].count("is a G1 model by its name") == 1) is noted
    (tmp_path / "out" / "o.csv").unlink()
    (tmp_path / "out" / "o.csv.json").unlink()
    code, err = call(GENERATE, words_of(good(GENERATE) | {"--load_model": str(tmp_path / name), "--template": "g1"}))
    assert code == 0 and "G1 model" not in err


@pytest.mark.parametrize(("path", "noted"), [
    ("RWKV7-G1-1.5B/model.pth", "its folder's name"), ("rwkv7-g1/rwkv-7-world.pth", "its folder's name"),
    ("rwkv7-g1/rwkv7-g1-1.5b.pth", "its name"), ("g1/model.pth", None), ("run_g1_0/x070.pth", None),
    ("rwkv7-g1/other/model.pth", None), ("rwkv-7-world/model.pth", None), ("rwkv-log1/model.pth", None)])
def test_a_folder_says_g1_too(path, noted, tmp_path, monkeypatch):
    found = model_note(path, recorded(CLASSIC))
    assert len(found) == (noted is not None) and all(f"{path} is a G1 model by {noted}, and" in line for line in found)
    assert model_note(path, recorded(TEMPLATES["g1"])) == []
    (tmp_path / path).parent.mkdir(parents=True)
    monkeypatch.chdir((tmp_path / path).parent)
    assert bool(model_note(Path(path).name, recorded(CLASSIC))) is (noted is not None)


def test_several_stops_and_end_of_text(call, good, tmp_path):
    flags = [*words_of(good(GENERATE) | {"--template": "g1", "--ban_end_of_text": "1"}), "--stop", "a", "--stop", "\\n\\n"]
    assert call(GENERATE, flags)[0] == 0
    made_how = json.loads((tmp_path / "out" / "o.csv.json").read_text())
    assert made_how["stop"] == ["a", "\n\n"] and made_how["ban_end_of_text"] is True


def test_stops_longer_than_a_table_of_them_can_be(call, good, tmp_path):
    for stops in (["é" * 501], ["a" * 400, "b" * 602]):
        code, err = call(GENERATE, words_of(good(GENERATE)) + [word for stop in stops for word in ("--stop", stop)])
        assert (code, err.count("\n")) == (2, 1) and "--stop: its texts have 1002 bytes together, of at most 1000" in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_s_chat_template_that_is_not_there(call, good, tmp_path, chatml):
    flags = good(PREPARE) | {"--template": chatml}
    assert call(PREPARE, words_of(flags))[0] == 0
    run = good(TRAIN) | {"--rlhf_train_file": flags["--output_save"], "--samples": "0"}
    assert call(TRAIN, words_of(run))[0] == 0
    adapter = str(tmp_path / "out" / "run" / "rwkv-final.safetensors")
    flags = words_of(good(EVALUATE) | {"--adapter": adapter, "--pairs": good(PREPARE)["--input_csv"]})
    Path(chatml).rename(tmp_path / "moved.jinja")
    code, err = call(EVALUATE, flags)
    assert code == 2 and f"error: --template: the adapter {adapter} was trained with the chat template {chatml}" in err
    code, err = call(EVALUATE, [*flags, "--template", str(tmp_path / "moved.jinja")])
    assert code == 0 and "warning" not in err, err


def test_another_loss_on_than_the_adapters_is_reported(call, good, fails, tmp_path):
    row = {"prompt": "What?", "chosen": "<think>a</think>b", "rejected": "<think>c</think>d"}
    (tmp_path / "thinks.jsonl").write_text(json.dumps(row))
    thinks, saves = str(tmp_path / "thinks.jsonl"), {}
    for loss_on in ("all", "answer"):
        saves[loss_on] = str(tmp_path / f"{loss_on}.save")
        flags = good(PREPARE) | {"--input_csv": thinks, "--output_save": saves[loss_on], "--loss_on": loss_on}
        assert call(PREPARE, words_of(flags))[0] == 0
    run = good(TRAIN) | {"--samples": "0", "--rlhf_train_file": saves["answer"]}
    assert call(TRAIN, words_of(run))[0] == 0
    adapter = tmp_path / "out" / "run" / "rwkv-final.safetensors"
    assert read_adapter(adapter).extra["loss_on"] == "answer"

    config = json.loads((adapter.parent / "config.json").read_text())
    assert config["loss_on"] == "answer"  # as it is, though the flag was not given
    assert "<dt>loss_on</dt><dd>answer</dd>" in (adapter.parent / "report.html").read_text()
    # A flag that says otherwise is refused, whichever file it contradicts; one that agrees is not even mentioned.
    for script, changes in ((EVALUATE, {"pairs": saves["answer"]}), (TRAIN, {"rlhf_train_file": saves["answer"]}),
                            (TRAIN, {"rlhf_train_file": saves["all"], "eval_file": saves["answer"]})):
        flags = {f"--{name}": value for name, value in changes.items()} | {"--loss_on": "all"}
        if script == TRAIN:
            flags |= {"--proj_dir": str(tmp_path / "refused")}
        fails(script, flags, f"--loss_on all: {saves['answer']} was prepared with --loss_on answer; leave the flag out")
    # Older runs wrote the flag's default.
    (adapter.parent / "config.json").write_text(json.dumps(config | {"loss_on": "all"}))
    for more in ({}, {"--loss_on": "answer"}):
        code, err = call(TRAIN, words_of(run | {"--resume": "1"} | more))
        assert code == 0 and "--loss_on" not in err, err

    def differing(script: str, **changes: str) -> int:
        code, err = call(script, words_of((good(EVALUATE) | {"--adapter": str(adapter)} if script == EVALUATE else run | {
            "--load_adapter": str(adapter), "--proj_dir": str(tmp_path / changes["rlhf_train_file"].replace("/", "-"))}) | {
                f"--{name}": value for name, value in changes.items()}))
        assert code == 0, err
        told = f"warning: the data have another --loss_on than the adapter {adapter} was trained with: all, not answer\n"
        return err.count(told)

    uses = [(EVALUATE, {"pairs": thinks, "loss_on": "all"}), (EVALUATE, {"pairs": saves["all"]}),
            (TRAIN, {"rlhf_train_file": saves["all"]})]
    assert [differing(script, **changes) for script, changes in uses] == [1, 1, 1]
    assert json.loads((tmp_path / "out" / "o.json").read_text())["loss_on"] == "all"
    # By default texts have the loss that the adapter was trained with.
    assert [differing(EVALUATE, pairs=saves["answer"]), differing(EVALUATE, pairs=thinks)] == [0, 0]
    report = json.loads((tmp_path / "out" / "o.json").read_text())
    assert report["loss_on"] == "answer" and report["tokens_chosen"] == 3  # "b" and a blank line
    # What does not say it is compared with nothing.
    extra = read_adapter(adapter).extra
    for said, told in (({}, 0), ({"loss_on": "all"}, 0), ({"loss_on": 3}, None), ({"loss_on": "half"}, None)):
        text = json.dumps({name: value for name, value in extra.items() if name != "loss_on"} | said)
        rewrite(adapter, change_metadata=lambda metadata, text=text: metadata.update(extra=text))
        if told is None:
            words = [f"{adapter}: what it records", "loss_on is a whole number where text"] if said["loss_on"] == 3 else [
                f"--loss_on: the adapter {adapter} was trained with half, which is not one of all, answer; give one of these"]
            fails(EVALUATE, {"--adapter": adapter, "--pairs": thinks}, *words)
        else:
            assert differing(EVALUATE, pairs=saves["all"]) == told


def test_a_note_on_a_template_is_told_once_a_run(call, good, tmp_path):
    (tmp_path / "end.jinja").write_text(CHATML.replace("<|im_end|>", "<|rwkv_tokenizer_end_of_text|>"))
    pairs = good(PREPARE)["--input_csv"]
    flags = good(TRAIN) | {"--rlhf_train_file": None, "--sft": "1", "--train_data_file": pairs, "--eval_file": pairs,
                           "--template": str(tmp_path / "end.jinja")}
    code, err = call(TRAIN, words_of(flags))
    assert code == 0 and err.count("<|rwkv_tokenizer_end_of_text|> is plain text") == 1, err


def test_fingerprints_stay_what_they_are():
    """Files record them: a change of these is a change of what templates do, and older files then count as another's."""
    assert {name: TEMPLATES[name].fingerprint[:8] for name in ("classic", "g1", "g1-think", "g1-fakethink")} == {
        "classic": "0c2c2fd8", "g1": "c189065c", "g1-think": "f8acd1c6", "g1-fakethink": "6760d0f4"}
    assert CLASSIC.fingerprint == TEMPLATES["classic"].fingerprint


def test_sft_under_a_template(call, good, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}, {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e\n\nf"}]}) + "\n")
    flags = {name: value for name, value in good(TRAIN).items() if name != "--rlhf_train_file"} | {
        "--sft": "1", "--train_data_file": str(tmp_path / "t.jsonl"), "--template": "g1"}
    counts = {}
    for number, more in enumerate(({}, {"--loss_on": "answer"}, {"--template": "classic"})):
        code, err = call(TRAIN, words_of(flags | more | {"--proj_dir": str(tmp_path / f"run{number}")}))
        assert code == 0, err
        counts[number] = json.loads((tmp_path / f"run{number}" / "config.json").read_text())["train_data"]
    # " <think>b</think>c\n\nUser:" and " e\n\nf" with token 0; without the thinking; " <think>b</think>c\n\n", " e\nf\n\n".
    assert [count["trained"] for count in counts.values()] == [25 + 6, 8 + 6, 20 + 6]
    assert [count["template"]["name"] for count in counts.values()] == ["g1", "g1", "classic"]
    assert [read_adapter(tmp_path / f"run{number}" / "rwkv-final.safetensors").extra["loss_on"] for number in counts] == [
        "all", "answer", "all"]
    again = flags | {"--proj_dir": str(tmp_path / "run0"), "--resume": "1"}
    assert call(TRAIN, words_of(again | {"--loss_on": "all"}))[0] == 0
    code, err = call(TRAIN, words_of(again | {"--loss_on": "answer"}))
    assert code == 2 and f"error: --resume 1: loss_on was all in {tmp_path / 'run0'} and is answer now" in err
