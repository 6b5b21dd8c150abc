"""Whatever a user can get wrong in an input: one line that names it, exit code 2, nothing written."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from src.checkpoint.io import load_checkpoint, save_checkpoint
from tests.adapters.test_files import rewrite
from tests.cli.conftest import SCRIPTS, check_told, snapshot, words_of

MODEL_FLAG = {"rlhf_generate_reject_csv": "--load_model", "rlhf_dpo_generate_save": "--load_model", "train": "--load_model",
              "merge": "--base", "evaluate": "--load_model"}
INPUTS = [(script, flag) for script, flag in MODEL_FLAG.items()] + [
    ("rlhf_generate_reject_csv", "--input_csv"), ("rlhf_dpo_generate_save", "--input_csv"), ("train", "--rlhf_train_file"),
    ("train", "--eval_file"), ("train", "--load_adapter"), ("train", "--layer_profile"),
    ("rlhf_dpo_generate_save", "--layer_profile"), ("merge", "--adapter"), ("evaluate", "--adapter"), ("evaluate", "--pairs"),
]
WITH_CODE = [(script, flag) for script, flag in INPUTS if flag not in ("--input_csv", "--layer_profile")]
OUTPUT_FLAG = {"rlhf_generate_reject_csv": "--output_csv", "rlhf_dpo_generate_save": "--output_save", "train": "--proj_dir",
               "merge": "--output", "evaluate": "--output_json"}
CSV_SCRIPTS = ("rlhf_generate_reject_csv", "rlhf_dpo_generate_save")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(("script", "flag"), INPUTS)
def test_an_input_that_is_missing_a_folder_or_empty(fails, tmp_path, script, flag):
    path = tmp_path / "none.pth"
    fails(script, {flag: path}, path, "does not exist")
    (tmp_path / "folder.pth").mkdir()
    fails(script, {flag: tmp_path / "folder.pth"}, tmp_path / "folder.pth", "not a file")
    fails(script, {flag: "/"}, "/ is not a file")  # a path without a name
    (tmp_path / "empty.pth").touch()
    fails(script, {flag: tmp_path / "empty.pth"}, tmp_path / "empty.pth")


@pytest.mark.parametrize(("script", "flag"), WITH_CODE)
@pytest.mark.parametrize("form", ["zip", "plain"])
@pytest.mark.parametrize("asked_for", [False, True])
def test_a_pickle_that_would_run_code_does_not(fails, tmp_path, monkeypatch, script, flag, form, asked_for):
    if asked_for:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trace = tmp_path / "bomb.pth", tmp_path / "trace"
    content = {"emb.weight": torch.zeros(2, 2), "x": Bomb(trace)}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"x": Bomb(trace)}))
    fails(script, {flag: path}, path)
    assert not trace.exists()
    if form == "zip":
        torch.load(path, weights_only=False)
        assert trace.exists()  # the bomb is one



@pytest.mark.parametrize("script", ["merge", "train"])
def test_no_variable_of_torch_makes_a_file_damaged(call, good, monkeypatch, script):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    code, err = call(script, words_of(good(script)))
    assert code == 0, err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_that_is_not_v6_or_v7(fails, tmp_path, material, script):
    square, vector = torch.zeros(8, 8), torch.zeros(8)
    v4 = {"emb.weight": square, "blocks.0.att.time_decay": vector, "blocks.0.att.time_first": vector}
    v5 = v4 | {"blocks.0.att.ln_x.weight": vector, "blocks.0.att.time_faaaa": square}
    whole = load_checkpoint(material / "x070.pth")
    lacking = {name: tensor for name, tensor in whole.items() if not name.startswith("blocks.0.ffn")}
    cases = [(v4, "older than v6"), (v5, "older than v6"), ({"model.layers.0.weight": square}, "not an RWKV checkpoint"),
             (lacking, "blocks.0.ffn"), (whole | {"head.weight": torch.zeros(8, 8)}, "head.weight")]
    for number, (weights, word) in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        save_checkpoint(weights, path)
        fails(script, {MODEL_FLAG[script]: path}, path, word)
    data = (material / "x070.pth").read_bytes()
    for name, content in (("cut.pth", data[:len(data) // 2]), ("text.pth", b"hello"), ("cut.safetensors", data[:900]),
        ("model.gguf", data)):
        (tmp_path / name).write_bytes(content)
        fails(script, {MODEL_FLAG[script]: tmp_path / name}, tmp_path / name)


@pytest.mark.parametrize("script", CSV_SCRIPTS)
@pytest.mark.parametrize(("content", "words"), [
    (b"question,answer\na,b\n", ("prompt", "chosen")),
    (b"prompt,reject\na,b\n", ("chosen",)),
    (b"prompt,chosen,reject\na,b,c\nd, ,f\n", ("row 2", "empty chosen")),
    (b"prompt,chosen,reject\na,b,c\n ,e,f\n", ("row 2", "empty prompt")),
    (b"prompt,chosen,reject\na,b,c\nd,e,f\ng,\xff\xfe,i\n", ("row 3", "UTF-8")),
    ("prompt,chosen,reject\na,b,c\n".encode("utf-16-le"), ("UTF-8",)),
    (b"prompt,chosen,reject\na,b,c\nd\0,e,f\n", ("row 2", "NUL")),
    (b"prompt,chosen,reject\na,b,c\nd,e\n", ("row 2", "fields")),
    (b'prompt,chosen,reject\na,"b,c\n', ("row 1",)),
    (b"prompt,chosen,chosen\na,b,c\n", ("more than once",)),
    (b"", ("empty",)),
    (b"\n\n", ("empty",)),
    (b"prompt,chosen,reject\n", ("no data row",)),
])
def test_a_csv_that_is_not_as_it_should_be(fails, tmp_path, script, content, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    fails(script, {"--input_csv": path}, path, *words)


@pytest.mark.parametrize("script", CSV_SCRIPTS)
@pytest.mark.parametrize(("name", "content", "words"), [
    ("bad.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"', ("row 2", "not JSON")),
    ("bad.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": [{"role": "tool"}]}', ("row 2", "tool")),
    ("bad.json", b"", ("empty",)), ("bad.parquet", b"PAR1 or so", ("Parquet",)),
])
def test_other_formats_that_are_not_as_they_should_be(fails, tmp_path, script, name, content, words):
    (tmp_path / name).write_bytes(content)
    fails(script, {"--input_csv": tmp_path / name}, tmp_path / name, *words)


@pytest.mark.parametrize("content", ["prompt,chosen\na,b\n", "prompt,chosen,reject\na,b,\n"])
def test_preparing_needs_a_reject(fails, tmp_path, content):
    (tmp_path / "bad.csv").write_text(content)
    fails("rlhf_dpo_generate_save", {"--input_csv": tmp_path / "bad.csv"}, "row 1 has no reject", "rlhf_generate_reject_csv.py")


@pytest.mark.parametrize("flag", ["--rlhf_train_file", "--eval_file"])
@pytest.mark.parametrize(("content", "words"), [
    ([([1, 2], [3, 999], [4], -1.0, -2.0)], ("token id 999", "pair 1", "256")),
    ([([1, 2], [3], [4], -1.0, -2.0), ([1, -2], [3], [4], -1.0, -2.0)], ("token id -2", "pair 2")),
    ([([1, 2], [3], [4], -1.0, float("nan"))], ("pair 1", "finite")),
    ([([1, 2], [3], [4])], ("pair 1", "3 entries")),
    ([(["a"], [3], [4], -1.0, -2.0)], ("pair 1", "str")),
    ([([1, 2], [], [4], -1.0, -2.0)], ("empty answer",)),
    ([([1] * 600, [3], [4], -1.0, -2.0)], ("512", "--rlhf_max_corpus_len")),
    ([], ("no pairs",)),
    ({"emb.weight": 1}, ("dict",)),
])
def test_a_save_that_is_not_as_it_should_be(fails, tmp_path, flag, content, words):
    torch.save(content, tmp_path / "bad.save")
    fails("train", {flag: tmp_path / "bad.save"}, tmp_path / "bad.save", *words)


def test_a_sidecar_of_another_save(fails, tmp_path, prepared):
    path = tmp_path / "moved.save"
    shutil.copy(prepared("x070"), path)
    for content in (b"{", b"[]", b"{}", b'{"sha256": "00"}', b"\xff"):
        Path(f"{path}.json").write_bytes(content)
        fails("train", {"--rlhf_train_file": path}, f"{path}.json")


def test_a_save_without_a_sidecar_trains_with_a_warning(call, good, tmp_path, prepared):
    shutil.copy(prepared("x070"), tmp_path / "older.save")
    code, err = call("train", words_of(good("train") | {"--rlhf_train_file": str(tmp_path / "older.save")}))
    assert code == 0
    assert err.startswith("warning: ") and "older.save.json" in err.splitlines()[0]


@pytest.mark.parametrize("script", ["train", "rlhf_dpo_generate_save"])
@pytest.mark.parametrize(("text", "words"), [
    ("Layer,Mode\nemb,freeze\n0,freeze\nhead,freeze\n", ("layer 1", "2 layers")),
    ("Layer,Mode\nemb,freeze\n0,boom\n1,freeze\nhead,freeze\n", ("line 3", "unknown mode 'boom'")),
    ("Layer,Mode\nemb,freeze\n0,bone\n1,freeze\nhead,freeze\n", ("line 3", "Rank", "mode bone")),
    ("Layer,Mode\nemb,freeze\n0,state\n1,freeze\nhead,freeze\n", ("line 3", "State_lr_init", "mode state")),
    ("Layer,Mode\nemb,freeze\n0,freeze\n1,freeze\nhead,state\n", ("line 5", "state is not for head")),
    ("Layer,Mode\nemb,freeze\n0,lora\n1,freeze\nhead,freeze\n", ("line 3", "Rank")),
    ("Layer,Mode\nemb,freeze\n0,freeze\n1,freeze\n2,freeze\nhead,freeze\n", ("line 5", "layer 2")),
    ("Schicht,Mode\nemb,freeze\n", ("'Schicht'",)),
])
def test_a_profile_that_is_not_as_it_should_be(fails, tmp_path, script, text, words):
    (tmp_path / "profile.csv").write_text(text)
    fails(script, {"--layer_profile": tmp_path / "profile.csv"}, tmp_path / "profile.csv", *words)


@pytest.mark.parametrize(("script", "strategy"), [
    ("train", None), ("rlhf_dpo_generate_save", "cpu fp32"), ("rlhf_dpo_generate_save", "cpu fp32i8")])
@pytest.mark.parametrize(("row", "words"), [
    ("0,freeze,,,,,,", ("nothing to train",)), ('0,lora,4,8,1,1,"att,ffn",', ("nothing to train",)),
    ("0,freeze,,,1,1,,att.kay", ("layer 0", "FullParts names 'att.kay'")),
    ("0,lora,65,8,1,1,,", ("layer 0", "rank 65 is too high")),
    ("0,lora,4,8,1,1,att.\0key,", ("layer 0", r"RejectParts names 'att.\x00key'")),
    ("0,lora,4,8,1e-400,1,,", ("line 3", "Weight_lr_init is '1e-400'")),
])
def test_a_profile_that_the_model_cannot_be_trained_by(fails, tmp_path, monkeypatch, script, strategy, row, words):
    """Told before any model is built."""
    monkeypatch.setattr("src.preference.prepare.build_model", None)
    monkeypatch.setattr("src.training.run.build_model", None)
    (tmp_path / "p.csv").write_text("Layer,Mode,Rank,Alpha,Weight_lr_init,Weight_lr_final,RejectParts,FullParts\nemb,freeze\n"
                                    f"{row}\n1,freeze\nhead,freeze\n")
    flags = {"--strategy": strategy} if strategy else {}
    fails(script, flags | {"--layer_profile": tmp_path / "p.csv"}, f"layer profile {tmp_path / 'p.csv'}", *words)


def test_a_rank_above_what_the_weights_have(fails, tmp_path):
    fails("train", {"--lora_r": 65}, "rank 65")
    fails("rlhf_dpo_generate_save", {"--strategy": "cpu fp32i8", "--peft": "pissa", "--lora_r": 65}, "rank 65")


@pytest.mark.parametrize("script", CSV_SCRIPTS)
def test_a_tokenizer_that_is_none_or_does_not_fit(fails, tmp_path, script):
    (tmp_path / "t.json").write_text("{}")
    for name, word in (("klingon", "klingon"), ("world", "256"), (tmp_path / "none.json", "does not exist"),
        (tmp_path / "t.json", "t.json")):
        fails(script, {"--tokenizer": name}, "--tokenizer", word)


def test_an_adapter_of_another_base_and_a_file_that_is_none(fails, tmp_path, material, adapter):
    fails("merge", {"--base": material / "x060.pth"}, "trained on the base model")
    fails("evaluate", {"--load_model": material / "x060.pth"}, adapter, "trained on the base model")
    save_checkpoint(load_checkpoint(material / "x070.pth"), tmp_path / "model.safetensors")
    fails("merge", {"--adapter": tmp_path / "model.safetensors"}, "not an adapter file")
    fails("train", {"--load_adapter": tmp_path / "model.safetensors"}, "not an adapter file")


def test_an_adapter_that_the_run_cannot_go_on_from(fails, adapter):
    for flags, words in (({"--peft": "pissa"}, ("mode lora", "says pissa")), ({"--lora_r": 5}, ("lora_A", "(5, 64)")),
                         ({"--lora_alpha": 5}, ("alpha 32.0", "says 5.0"))):
        fails("train", flags | {"--load_adapter": adapter}, adapter, *words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_place_that_cannot_be_written(fails, tmp_path, script):
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder.pth").mkdir()
    flag = OUTPUT_FLAG[script]
    fails(script, {flag: tmp_path / "file" / "deeper" / "o.pth"}, tmp_path / "file")
    taken = tmp_path / ("file" if script == "train" else "folder.pth")
    fails(script, {flag: taken}, taken)


@pytest.mark.parametrize(("script", "beside"), [
    ("rlhf_generate_reject_csv", "o.csv.json"), ("rlhf_dpo_generate_save", "o.save.json"),
    ("rlhf_dpo_generate_save", "o.save.partial"), ("merge", "o.pth"), ("evaluate", "o.json"),
])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device"])
def test_a_file_beside_the_output_that_cannot_be_written(fails, tmp_path, monkeypatch, script, beside, kind):
    """Told before any work: a model's tensors are not even looked at."""
    monkeypatch.setattr("src.checkpoint.base.load_checkpoint", None)
    path = tmp_path / "out" / beside
    path.parent.mkdir()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to a device": lambda: path.symlink_to("/dev/null")}[kind]()
    fails(script, {}, path, {"folder": "a folder", "pipe": "a pipe", "link to a device": "a device"}[kind])


def test_states_that_cannot_be_written_beside_a_merged_model(fails, call, good, adapter, material, tmp_path):
    states = Path(shutil.copy(adapter, tmp_path / "states.safetensors"))
    rewrite(states, lambda tensors: tensors.update({"blocks.0.att.time_state": torch.zeros(4, 16, 16)}))
    (tmp_path / "out" / "o.state.pth").mkdir(parents=True)
    fails("merge", {"--adapter": states}, tmp_path / "out" / "o.state.pth", "a folder")
    assert call("merge", words_of(good("merge")))[0] == 0  # without states there is no such file
    (tmp_path / "new.state.pth").write_text("mine")
    fails("merge", {"--adapter": states, "--output": tmp_path / "new.pth"}, tmp_path / "new.state.pth", "would overwrite it")


def test_a_file_of_somebody_that_has_the_sidecar_s_name(fails, call, good, tmp_path):
    sidecar = tmp_path / "new.save.json"
    sidecar.write_text('{"my": "dataset"}')
    fails("rlhf_dpo_generate_save", {"--output_save": tmp_path / "new.save"}, sidecar, "is no sidecar")
    assert call("rlhf_dpo_generate_save", words_of(good("rlhf_dpo_generate_save")))[0] == 0
    flags = good("rlhf_dpo_generate_save") | {"--output_save": str(tmp_path / "again.save")}
    assert call("rlhf_dpo_generate_save", words_of(flags))[0] == 0
    (tmp_path / "again.save").unlink()  # one of its own stands in nobody's way
    assert call("rlhf_dpo_generate_save", words_of(flags))[0] == 0


@pytest.mark.parametrize(("script", "source"), [("rlhf_generate_reject_csv", "--input_csv"), ("rlhf_generate_reject_csv",
    "--load_model"),
                                                ("rlhf_dpo_generate_save", "--input_csv"), ("rlhf_dpo_generate_save",
                                                "--load_model"),
                                                ("merge", "--base"), ("merge", "--adapter"), ("evaluate", "--load_model"),
                                                ("evaluate", "--adapter"), ("evaluate", "--pairs")])
def test_an_output_that_is_an_input(fails, good, tmp_path, script, source):
    copy = tmp_path / Path(good(script)[source]).name
    shutil.copy(good(script)[source], copy)
    fails(script, {source: copy, OUTPUT_FLAG[script]: copy}, copy)


def test_merge_writes_two_endings_only(fails, tmp_path):
    for name in ("o.gguf", "o", "o.bin"):
        fails("merge", {"--output": tmp_path / name}, name, ".pth or .safetensors")


def test_a_run_whose_files_are_damaged_is_not_resumed(call, good, tmp_path):
    flags = good("train")
    run = Path(flags["--proj_dir"])
    assert call("train", words_of(flags))[0] == 0
    for name, content in (("last.ckpt", b"hello"), ("config.json", b"{"), ("config.json", b"5"), ("metrics.jsonl",
        b"hello\n{}\n")):
        saved = (run / name).read_bytes()
        (run / name).write_bytes(content)
        before = snapshot(tmp_path)
        code, err = call("train", words_of(flags | {"--resume": "1"}))
        check_told(code, err.splitlines(keepends=True)[-1], (run / name,))
        after = snapshot(tmp_path)
        assert after == before, name
        (run / name).write_bytes(saved)


@pytest.fixture
def spoiled(adapter, tmp_path) -> Path:
    """The adapter with infinity in one of its tensors."""
    path = Path(shutil.copy(adapter, tmp_path / "spoiled.safetensors"))
    rewrite(path, lambda tensors: tensors["blocks.1.att.key.lora_B"][5].fill_(torch.inf))
    return path


@pytest.mark.parametrize(("script", "flag"), [("merge", "--adapter"), ("evaluate", "--adapter"), ("train", "--load_adapter")])
def test_an_adapter_that_is_not_finite(fails, spoiled, script, flag):
    fails(script, {flag: spoiled}, f"{spoiled}: blocks.1.att.key.lora_B (4 of 256 values) are not finite", "an earlier adapter")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("name", "dtype", "value"), [
    ("emb.weight", torch.float32, torch.nan), ("head.weight", torch.float16, torch.inf),
    ("ln_out.bias", torch.bfloat16, torch.nan), ("blocks.1.att.key.weight", torch.float32, -torch.inf),
    ("blocks.0.ffn.value.weight", torch.float8_e5m2, torch.nan),
])
def test_a_checkpoint_with_one_value_that_is_not_finite(fails, material, tmp_path, script, name, dtype, value):
    weights = load_checkpoint(material / "x070.pth")
    weights[name] = weights[name].index_fill(0, torch.tensor([0]), 0.0)
    weights[name].view(-1)[0] = value
    weights[name] = weights[name].to(dtype)
    save_checkpoint(weights, tmp_path / "bad.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "o.pth").write_bytes(b"an earlier result")
    fails(script, {MODEL_FLAG[script]: tmp_path / "bad.pth"},
          f"bad.pth: {name} (1 of {weights[name].numel()} values) are not finite")


def test_whose_log_probabilities_are_not_finite(fails, call, good, adapter, material, prepared, tmp_path):
    """The adapter's, the checkpoint's or the reference model's; each has finite values and gives none."""
    weights = load_checkpoint(material / "x070.pth")
    huge = tmp_path / "huge.pth"
    save_checkpoint(weights | {"head.weight": torch.full_like(weights["head.weight"], 3e38)}, huge)
    large = Path(shutil.copy(adapter, tmp_path / "large.safetensors"))
    rewrite(large, lambda tensors: [tensor.fill_(1e18) for tensor in tensors.values()])
    csv, base = material / "pairs.csv", material / "x070.pth"
    for pairs in (csv, prepared("x070")):
        fails("evaluate", {"--adapter": large, "--pairs": pairs}, f"the adapter {large} on {base} gives log-prob", "not finite")
    fails("evaluate", {"--load_model": huge, "--adapter": None}, f"the checkpoint {huge} gives log-prob")
    flags = {"--reference_model": huge, "--adapter": None, "--pairs": csv}
    fails("evaluate", flags, f"the reference model {huge} gives log-prob")
    output = tmp_path / "p.save"
    flags = {"--load_model": str(huge), "--output_save": str(output)}
    code, err = call("rlhf_dpo_generate_save", words_of(good("rlhf_dpo_generate_save") | flags))
    check_told(code, err, (f"the checkpoint {huge} gives log-prob",))
    assert not output.exists() and not Path(f"{output}.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_an_output_that_is_no_file(fails, tmp_path, script, kind):
    if script == "train":
        pytest.skip("its output is a folder")
    path = tmp_path / "out.pth"
    {"a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/null"), "a folder": Path.mkdir}[kind](path)
    fails(script, {OUTPUT_FLAG[script]: path}, path, "cannot be written, since " + kind)
    assert kind != "a device" or path.is_symlink()


@pytest.mark.parametrize(("script", "flag", "name", "output", "more"), [
    ("evaluate", "--pairs", "p.save", "p.save.json", {}), ("evaluate", "--tokenizer", "t.json", "t.json", {"--pairs": "CSV"}),
    ("evaluate", "--reference_model", "m.json.pth", "m.json", {"--pairs": "CSV", "--reference_model": "m.json"}),
    ("rlhf_generate_reject_csv", "--tokenizer", "o.json", "o", {}),
    ("rlhf_dpo_generate_save", "--tokenizer", "t.json", "t.json", {}),
    ("rlhf_dpo_generate_save", "--layer_profile", "l.csv", "l.csv", {"--strategy": "cpu fp32i8"}),
    ("rlhf_dpo_generate_save", "--load_model", "m.pth", "m", {"--output_save": "m.pth", "--load_model": "m"}),
])
def test_no_output_takes_the_place_of_an_input(fails, good, material, prepared, tmp_path, script, flag, name, output, more):
    """Neither of a file that a flag names nor of one that is read beside it, and none takes it by a file beside the output."""
    path = tmp_path / name
    source = {"--pairs": prepared("x070"), "--tokenizer": material / "pairs.csv", "--layer_profile": material / "pairs.csv",
              "--reference_model": material / "x070.pth", "--load_model": material / "x070.pth"}[flag]
    shutil.copy(source, path)
    if flag == "--pairs":
        shutil.copy(f"{source}.json", f"{path}.json")
    out = tmp_path / output
    if name == "m.json.pth":
        shutil.copy(source, out)
    changes = {flag: path, OUTPUT_FLAG[script]: out} | {
        key: material / "pairs.csv" if value == "CSV" else tmp_path / value if "/" not in value and key != "--strategy" else value
        for key, value in more.items()}
    fails(script, changes, f"is also the file of {flag} and would be overwritten")


@pytest.mark.parametrize(("script", "output", "words"), [
    ("rlhf_generate_reject_csv", "--output_csv", {"--tokenizer": "bytes"}),
    ("rlhf_dpo_generate_save", "--output_save", {"--tokenizer": "bytes", "--layer_profile": "auto"}),
    ("evaluate", "--output_json", {"--tokenizer": "bytes", "--pairs": "CSV"})])
def test_a_word_is_no_file_whatever_is_called_so(call, good, material, tmp_path, monkeypatch, script, output, words):
    monkeypatch.chdir(tmp_path)
    words = {flag: str(material / "pairs.csv") if value == "CSV" else value for flag, value in words.items()}
    for name in ("bytes", "world", "auto", "bytes.pth", "auto.pth"):
        for _ in range(2):  # the second one finds a file of this name
            code, err = call(script, words_of(good(script) | words | {output: name}))
            assert code == 0, err


def test_a_file_named_like_a_tokenizer_breaks_off_no_generation(call, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = good("rlhf_generate_reject_csv")
    output = Path(flags["--output_csv"])
    assert call("rlhf_generate_reject_csv", words_of(flags))[0] == 0
    whole = output.read_bytes()
    output.write_bytes(whole[:len(whole) // 2])
    (tmp_path / "bytes").write_text("x")
    code, err = call("rlhf_generate_reject_csv", words_of(flags))
    assert code == 0 and output.read_bytes() == whole, err


@pytest.mark.parametrize(("flag", "name"), [
    ("--load_model", "rwkv-1.safetensors"), ("--load_model", "rwkv-final.state.pth"), ("--load_adapter", "rwkv-1.safetensors"),
    ("--eval_file", "last.ckpt"), ("--rlhf_train_file", "report.html"), ("--layer_profile", "curves.png"),
])
@pytest.mark.parametrize("linked", [False, True])
def test_a_run_writes_over_none_of_its_inputs(fails, good, material, prepared, adapter, tmp_path, flag, name, linked):
    sources = {"--load_model": material / "x070.pth", "--load_adapter": adapter, "--eval_file": prepared("x070"),
               "--rlhf_train_file": prepared("x070"), "--layer_profile": tmp_path / "profile.csv"}
    sources["--layer_profile"].write_text("Layer,Mode\n" + "".join(f"{layer},freeze\n" for layer in ("emb", 0, 1, "head")))
    folder = tmp_path / "out" / "run"
    folder.mkdir(parents=True)
    if name.endswith(".safetensors") and flag == "--load_model":
        save_checkpoint(load_checkpoint(sources[flag]), folder / name)
    else:
        shutil.copy(sources[flag], folder / name)
    given = folder / name
    if linked:
        given = tmp_path / ("link" + given.suffix)
        given.symlink_to(folder / name)
    fails("train", {flag: given}, f"{flag}: {given} would be overwritten", "choose another --proj_dir")


@pytest.mark.parametrize("name", ["report.html", "curves.png", "rwkv-3.safetensors", "rwkv-final.state.pth", "samples.jsonl"])
def test_a_folder_with_files_of_somebody_else(fails, tmp_path, name):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / name).write_text("mine")
    fails("train", {}, name, "belongs to no run and would be overwritten")
