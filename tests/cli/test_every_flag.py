"""Every flag of every script has an effect, or a line that says it has none; told from the parsers, so that none is missed."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from src.adapters.layer_profile import read_layer_profile
from src.checkpoint.io import load_safetensors
from src.errors import UserError
from tests.cli.conftest import SCRIPTS, words_of
from tests.data.test_binidx import put

MODULES = {"rlhf_generate_reject_csv": "generate", "rlhf_dpo_generate_save": "prepare", "train": "train", "merge": "merge",
           "evaluate": "evaluate"}
GENERATE, PREPARE, TRAIN, MERGE, EVALUATE = SCRIPTS
NEEDED = {
    GENERATE: {"--load_model": "m.pth", "--input_csv": "i.csv", "--output_csv": "o.csv", "--strategy": "cpu fp32"},
    PREPARE: {"--load_model": "m.pth", "--input_csv": "i.csv", "--output_save": "o.save", "--strategy": "cpu fp32nf4"},
    TRAIN: {"--load_model": "m.pth", "--rlhf_train_file": "p.save", "--proj_dir": "run", "--accelerator": "cpu"},
    MERGE: {"--base": "m.pth", "--adapter": "a.safetensors", "--output": "o.pth"},
    EVALUATE: {"--load_model": "m.pth", "--pairs": "i.csv", "--strategy": "cpu fp32"},
}
SFT = {"--sft": "1", "--rlhf_train_file": None, "--train_data_file": "t.jsonl"}
# Two values with which the run differs or one is refused, and what else has to be given for that.
EFFECT = {
    GENERATE: {
        "--load_model": ("a", "b"), "--input_csv": ("a", "b"), "--skip_bad_rows": ("0", "1"), "--output_csv": ("a", "b"),
        "--strategy": ("cpu fp32", "cpu bf16"), "--tokenizer": ("bytes", "world"), "--overwrite": ("0", "1"),
        "--seed": ("0", "1"), "--batch_size": ("auto", "3"), "--num_rejects": ("1", "2"), "--avoid_equal": ("0", "1"),
        "--ctx_len": ("9", "10"),
        "--temperature": ("0.5", "1"), "--top_p": ("0.3", "0.4"), "--top_k": ("0", "5"), "--presence": ("0", "-1e-3"),
        "--frequency": ("0", "1"), "--penalty_decay": ("0.9", "1"), "--max_tokens": ("1", "2"), "--stop": ("", "x"),
        "--ban_end_of_text": ("0", "1"), "--template": ("classic", "g1")},
    PREPARE: {
        "--load_model": ("a", "b"), "--input_csv": ("a", "b"), "--output_save": ("a", "b"), "--check_data": ("0", "1"),
        "--skip_bad_rows": ("0", "1"), "--target_pair_count": ("1", "2"), "--strategy": ("cpu fp32", "cpu bf16"),
        "--rlhf_max_corpus_len": ("9", "10"), "--tokenizer": ("bytes", "world"), "--layer_profile": ("auto", "no.csv"),
        "--peft": ("lora", "pissa"), "--lora_r": ("1", "2", {"--peft": "pissa"}), "--seed": ("0", "1"),
        "--batch_tokens": ("8", "9"), "--reference": ("0", "1"), "--template": ("classic", "g1"), "--loss_on": ("all", "answer"),
        "--unpair": ("0", "1"), "--pairs": ("all", "adjacent"), "--min_gap": ("0.5", "1")},
    TRAIN: {
        "--load_model": ("a", "b"), "--n_layer": ("1", "2"), "--n_embd": ("1", "2"), "--vocab_size": ("1", "2"),
        "--my_testing": ("x060", "x070"), "--quant": ("0", "1"), "--quant_mode": ("nf4", "int8", {"--quant": "1"}),
        "--layer_profile": ("auto", "p.csv"), "--peft": ("lora", "dora"), "--lora_r": ("1", "2"), "--lora_alpha": ("1", "2"),
        "--load_adapter": ("a", "b"), "--rlhf_train_file": ("a", "b"), "--train_data_file": ("a", "b", SFT),
        "--skip_bad_rows": ("0", "1", SFT), "--tokenizer": ("bytes", "world", SFT),
        "--template": ("classic", "g1"), "--loss_on": ("all", "answer"), "--eval_file": ("a", "b"),
        "--ctx_len": ("9", "10"), "--rlhf_max_corpus_len": ("9", "10"), "--sft": ("0", "1"), "--loss": ("dpo", "ipo"),
        "--dpo": ("0", "1"), "--orpo": ("0", "1"), "--simpo": ("0", "1"), "--dpo_beta": ("1", "2"), "--dpo_alpha": ("1", "2"),
        "--label_smoothing": ("0", "0.1"), "--orpo_alpha": ("1", "2", {"--loss": "orpo"}),
        "--simpo_beta": ("1", "2", {"--loss": "simpo"}), "--simpo_gamma": ("1", "2", {"--loss": "simpo"}),
        "--simpo_alpha": ("1", "2", {"--loss": "simpo"}), "--cpo_beta": ("1", "2", {"--loss": "cpo"}),
        "--cpo_alpha": ("1", "2", {"--loss": "cpo"}), "--kto_beta": ("1", "2", {"--loss": "kto"}),
        "--kto_desirable_weight": ("1", "2", {"--loss": "kto"}), "--kto_undesirable_weight": ("1", "2", {"--loss": "kto"}),
        "--kto_alpha": ("1", "2", {"--loss": "kto"}), "--sft_on_prompt": ("0", "1"), "--infctx": ("0", "1"),
        "--epoch_steps": ("0", "1"), "--epoch_count": ("1", "2"), "--epoch_begin": ("0", "1"), "--epoch_save": ("1", "2"),
        "--micro_bsz": ("1", "2"), "--batch_tokens": ("0", "9"), "--accumulate_grad_batches": ("1", "2"),
        "--lr_init": ("0", "1"), "--lr_final": ("0", "1"), "--lr_advanced": ("0", "1", {"--layer_profile": "p.csv"}),
        "--warmup_steps": ("0", "1"), "--beta1": ("0", "0.9"), "--beta2": ("0", "0.9"), "--adam_eps": ("1e-8", "1e-7"),
        "--optim": ("adamw", "adamw_8bit"), "--gradient_clip_val": ("0", "1"), "--grad_cp": ("0", "1"), "--compile": ("0", "1"),
        "--accelerator": ("cpu", "gpu"), "--devices": ("1", "2"), "--precision": ("fp32", "bf16"), "--strategy": ("auto", "ddp"),
        "--gpu_arch": ("cuda", "rocm", {"--accelerator": "gpu"}), "--proj_dir": ("a", "b"), "--wandb": ("a", "b"),
        "--tensorboard": ("0", "1"), "--samples": ("0", "1"), "--sample_tokens": ("1", "2"), "--resume": ("0", "1"),
        "--seed": ("0", "1"), "--allow_reference_mismatch": ("0", "1")},
    MERGE: {"--base": ("a", "b"), "--adapter": ("a", "b"), "--output": ("a", "b")},
    EVALUATE: {
        "--load_model": ("a", "b"), "--adapter": ("a", "b"), "--pairs": ("a", "b"), "--skip_bad_rows": ("0", "1"),
        "--reference_model": ("a", "b"), "--output_json": ("a", "b"), "--dpo_beta": ("1", "2"),
        "--strategy": ("cpu fp32", "cpu bf16"), "--rlhf_max_corpus_len": ("9", "10"), "--tokenizer": ("bytes", "world"),
        "--seed": ("0", "1"), "--batch_tokens": ("8", "9"), "--template": ("classic", "g1"), "--loss_on": ("all", "answer"),
        "--list_pairs": ("all", "adjacent"), "--min_gap": ("0.5", "1")},
}
PROFILE, OLD_PROFILE, TEXTS, CORPUS = "profile.csv", "old.csv", "texts.txt", "corpus.bin"  # written into the folder of a test
NO_PREFERENCES = ("--dpo_beta", "--dpo_alpha", "--label_smoothing", "--orpo_alpha", "--simpo_beta", "--simpo_gamma",
                  "--simpo_alpha", "--cpo_beta", "--cpo_alpha", "--kto_beta", "--kto_desirable_weight",
                  "--kto_undesirable_weight", "--kto_alpha")
# Flags that have no effect: what else is given, the flag, two values, and a word of the reason.
NONE = {
    GENERATE: [
        *[({"--temperature": "0"}, flag, *values, "likeliest") for flag, values in (
            ("--top_p", ("0.3", "1")), ("--top_k", ("0", "5")), ("--seed", ("0", "1")))],
        *[({"--top_k": "1"}, flag, *values, "likeliest") for flag, values in (
            ("--top_p", ("0.3", "1")), ("--temperature", ("1", "2")), ("--seed", ("0", "1")), ("--avoid_equal", ("0", "1")))],
        ({"--presence": "0", "--frequency": "0"}, "--penalty_decay", "0.5", "1", "repeated tokens have no penalty")],
    PREPARE: [
        *[({"--strategy": "cpu fp32"}, flag, *values, "no weight is quantized") for flag, values in (
            ("--layer_profile", ("auto", PROFILE)), ("--peft", ("full", "pissa")), ("--lora_r", ("4", "8")))],
        *[({"--reference": "0"}, flag, *values, "computes nothing") for flag, values in (
            ("--strategy", ("cpu fp32", "cpu bf16")), ("--batch_tokens", ("99", "8192")), ("--peft", ("full", "pissa")))],
        *[({"--layer_profile": PROFILE}, flag, *values, "profile says") for flag, values in (
            ("--peft", ("full", "pissa")), ("--lora_r", ("4", "8")))],
        ({}, "--lora_r", "4", "8", "--peft lora splits no weight"),
        *[({"--check_data": "1"}, flag, *values, "writes nothing") for flag, values in (
            ("--output_save", ("x", "y")), ("--target_pair_count", ("5", "6")), ("--strategy", ("cpu fp32", "cpu bf16")),
            ("--batch_tokens", ("99", "8192")), ("--reference", ("0", "1")), ("--unpair", ("0", "1")),
            ("--layer_profile", ("auto", PROFILE)),
            ("--peft", ("full", "pissa")), ("--lora_r", ("4", "8")))]],
    TRAIN: [
        *[(SFT, flag, "0.1", "0.2", "no preferences") for flag in NO_PREFERENCES],
        *[(SFT, flag, "0", "0", "no preferences") for flag in ("--dpo", "--orpo", "--simpo")],
        (SFT, "--allow_reference_mismatch", "0", "1", "no preferences"),
        (SFT, "--samples", "0", "3", "no samples"), (SFT, "--sample_tokens", "5", "6", "no samples"),
        ({}, "--tokenizer", "bytes", "world", "tokens"), ({}, "--skip_bad_rows", "0", "1", "tokens"),
        *[(SFT | {"--train_data_file": file}, flag, *values, "no rows") for flag, values in (
            ("--skip_bad_rows", ("0", "1")), ("--sft_on_prompt", ("0", "1")), ("--loss_on", ("all", "answer")))
          for file in (TEXTS, CORPUS, CORPUS.removesuffix(".bin"))],
        ({}, "--quant_mode", "nf4", "int8", "--quant 1"), ({}, "--gpu_arch", "cuda", "rocm", "CPU"),
        *[({"--layer_profile": PROFILE}, flag, *values, "profile") for flag, values in (
            ("--lora_r", ("4", "8")), ("--lora_alpha", ("1", "2")), ("--peft", ("full", "bone")), ("--lr_init", ("0.1", "0.2")),
            ("--lr_final", ("0.1", "0.2")))],
        ({"--layer_profile": OLD_PROFILE}, "--lr_advanced", "0", "1", "are used"), ({}, "--lr_advanced", "0", "1", "are used"),
        *[({"--peft": mode}, "--lora_alpha", "1", "2", f"--peft {mode} has no alpha") for mode in ("bone", "pissa", "full",
                                                                                                "state")],
        *[({"--peft": mode}, "--lora_r", "4", "8", f"--peft {mode} has no rank") for mode in ("full", "state")],
        ({"--dpo_alpha": "0"}, "--sft_on_prompt", "0", "1", "has weight 0"),
        ({"--loss": "simpo"}, "--sft_on_prompt", "0", "1", "has weight 0"),
        ({"--batch_tokens": "200"}, "--micro_bsz", "1", "2", "--batch_tokens"),
        ({"--samples": "0"}, "--sample_tokens", "5", "6", "--samples 0"),
        *[({"--loss": loss}, "--allow_reference_mismatch", "0", "1", "no reference") for loss in ("simpo", "orpo", "cpo")]],
    EVALUATE: [({"--pairs": "p.save"}, flag, *values, "tokens") for flag, values in (
        ("--tokenizer", ("bytes", "world")), ("--seed", ("0", "1")), ("--skip_bad_rows", ("0", "1")),
        ("--list_pairs", ("all", "adjacent")), ("--min_gap", ("0.5", "1")))],
}
CASES = [(script, *case) for script, cases in NONE.items() for case in cases]
IDS = [f"{script}-{flag}-{reason.split()[-1]}" for script, _, flag, _, _, reason in CASES]

RATES = ("Layer,Mode,Rank,Alpha,Weight_lr_init,Weight_lr_final\n"
         "emb,freeze\n0,lora,4,8,1e-3,1e-4\n1,lora,4,8,1e-3,1e-4\nhead,freeze\n")
OLD = "Layer,Mode,Rank,Alpha,LRScale\nemb,freeze\n0,lora,4,8,1\n1,lora,4,8,1\nhead,freeze\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(PROFILE).write_text(RATES)
    Path(OLD_PROFILE).write_text(OLD)
    Path(TEXTS).write_text("One document.\0Another one.")
    put(Path(), [[*b"One document.", 0], [*b"Another one.", 0]])


def cli(script):
    return importlib.import_module(f"src.cli.{MODULES[script]}")


def parsed(script, flags):
    """What the command comes to, and its notes; or why it is refused."""
    try:
        *made, notes = cli(script).parse(words_of(flags))
    except UserError as error:
        return str(error), ()
    return str(made), notes


def no_effect(notes) -> str:
    return next((note for note in notes if note.startswith("note: no effect: ")), "")


def named(notes) -> set[str]:
    return set(re.findall(r"--\w+", re.sub(r"\([^)]*\)", "", no_effect(notes))))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_here(script):
    own = cli(script).parser().flags() - {"-h", "--help"}
    assert own == EFFECT[script].keys()
    assert {flag for _, flag, *_ in NONE.get(script, [])} <= own


@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script in SCRIPTS for flag in EFFECT[script]])
def test_where_it_has_an_effect_another_value_makes_another_run_and_nothing_is_said(script, flag, monkeypatch):
    if flag == "--gpu_arch":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    one, other, *more = EFFECT[script][flag]
    flags = NEEDED[script] | (more[0] if more else {})
    (first, notes), (second, _) = (parsed(script, flags | {flag: value}) for value in (one, other))
    assert first != second
    assert flag not in named(notes)


@pytest.mark.parametrize(("script", "more", "flag", "one", "other", "reason"), CASES, ids=IDS)
def test_where_it_has_none_one_line_says_so_and_why(script, more, flag, one, other, reason):
    for value in (one, other):
        _, notes = parsed(script, NEEDED[script] | more | {flag: value})
        line = no_effect(notes)
        assert flag in named(notes), (notes, value)
        assert reason in line and "\n" not in line
    assert flag not in named(parsed(script, (NEEDED[script] | more) | {flag: None})[1])


def outcome(script: str, flags: dict[str, str]) -> object:
    """What the run made, without what only tells of the run."""
    if script == TRAIN:
        return {name: tensor.tolist() for name, tensor in
                load_safetensors(f"{flags['--proj_dir']}/rwkv-final.safetensors")[0].items()}
    return Path(next(flags[flag] for flag in ("--output_csv", "--output_save", "--output_json") if flags.get(flag))).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "more", "flag", "one", "other", "reason"),
                         [case for case in CASES if "--check_data" not in case[1]])
def test_the_line_is_true(call, good, prepared, tmp_path, monkeypatch, script, more, flag, one, other, reason):
    """Two values, the same result."""
    monkeypatch.setattr("src.training.run.draw_curves", lambda *_: None)
    monkeypatch.setattr("src.evaluation.report.write_report", lambda *_: None)
    (tmp_path / "t.jsonl").write_text('{"prompt": "What is one?", "completion": "A number."}\n' * 3)
    flags = {name: value for name, value in good(script).items() if name != "--lora_r" or "--layer_profile" not in more}
    changes = dict(more) | ({"--pairs": str(prepared("x070"))} if script == EVALUATE else {})
    if script == PREPARE:
        flags["--strategy"] = "cpu fp32nf4"
    if script == TRAIN and "sample" not in flag:
        flags |= {"--sample_tokens": "1"}
    made = []
    for number, value in enumerate((one, other)):
        if flag == "--tokenizer" and script in (TRAIN, EVALUATE):
            value = ("bytes", "world")[number]
        given = flags | changes | {flag: value}
        for output in ("--output_csv", "--output_save", "--output_json", "--proj_dir"):
            if output in given:
                given[output] = str(tmp_path / f"made{number}")
        code, err = call(script, words_of(given))
        assert code == 0, err
        assert err.count("note: no effect:") == 1 and flag in err
        made.append(outcome(script, given))
    assert made[0] == made[1]


def test_a_flag_that_is_given_twice_is_named():
    _, notes = parsed(MERGE, NEEDED[MERGE])
    assert notes == ()
    made, notes = cli(MERGE).parse([*words_of(NEEDED[MERGE]), "--base=other.pth"])
    assert made.base == "other.pth" and notes == ("note: given more than once, the last one counts: --base (2 times)",)
    made, _, notes = cli(TRAIN).parse([*words_of(NEEDED[TRAIN]), "--seed", "1", "--random_seed", "2"])
    assert made.run.seed == 2 and notes == ("note: given more than once, the last one counts: --seed (2 times)",)


def test_stops_are_collected():
    made, notes = cli(GENERATE).parse([*words_of(NEEDED[GENERATE]), "--stop", "a", "--stop=\\n\\nUser:", "--stop", ""])
    assert made.sampling.stop == ("a", "\n\nUser:", "") and notes == ()


def test_an_old_spelling_counts_as_what_it_means():
    _, notes = parsed(TRAIN, NEEDED[TRAIN] | {"--layer_profile": PROFILE, "--lora_config": '{"lora_r": 8, "lora_alpha": 16}'})
    assert no_effect(notes) == "note: no effect: --lora_r, --lora_alpha (the layer profile says what trains)"


def test_a_command_of_this_family_runs_with_a_line(call, good, prepared):
    """Rates beside a profile that has its own, as all their examples have them."""
    flags = good(TRAIN) | {"--layer_profile": PROFILE, "--infctx": "0", "--vocab_size": "256", "--lr_init": "5e-6",
                           "--lr_final": "1e-6", "--warmup_steps": "1", "--gpu_arch": "cuda", "--samples": "0", "--resume": "1"}
    code, err = call(TRAIN, words_of(flags))
    assert code == 0
    on_resume, on_flags = err.splitlines()[:2]
    assert on_flags == ("note: no effect: --lora_r (the layer profile says what trains); --lr_init, --lr_final (the layer "
                        "profile's rates are used); --gpu_arch (the run is on the CPU)")
    assert on_resume.startswith("note: no effect: --resume 1 (")
    assert read_layer_profile(PROFILE, 2)[1].weight_lr_init == 1e-3
    # Another choice of flags goes on with the same run.
    code, err = call(TRAIN, words_of({name: value for name, value in flags.items() if name != "--gpu_arch"}))
    assert code == 0 and "--gpu_arch" not in err and "--resume" not in err


def test_margins_that_are_not_there_have_no_beta(call, good, material):
    flags = good(EVALUATE) | {"--pairs": str(material / "pairs.csv"), "--adapter": None, "--dpo_beta": "0.1"}
    code, err = call(EVALUATE, words_of(flags))
    assert code == 0 and "note: no effect: --dpo_beta (" in err
    code, err = call(EVALUATE, words_of(flags | {"--reference_model": str(material / "x070.pth")}))
    assert code == 0 and "note" not in err


@pytest.mark.parametrize(("script", "changes", "flag"), [
    (TRAIN, {}, "--tokenizer"), (TRAIN, {"--sft": "1"}, "--label_smoothing"), (TRAIN, {}, "--quant_mode"),
    (TRAIN, {"--layer_profile": PROFILE}, "--lora_r"), (TRAIN, {"--layer_profile": PROFILE}, "--lr_init"),
    (PREPARE, {"--check_data": "1"}, "--layer_profile"), (PREPARE, {"--reference": "0"}, "--strategy"),
    (EVALUATE, {"--pairs": "p.save"}, "--tokenizer"), (GENERATE, {"--temperature": "0"}, "--top_p"),
])
def test_a_wrong_value_is_refused_where_it_would_not_be_used(fails, script, changes, flag):
    fails(script, changes | {flag: "nonsense"}, flag if flag != "--layer_profile" else "layer profile: nonsense does not exist")


def test_what_is_told_in_vain_is_no_setting_of_the_run(call, good, monkeypatch):
    monkeypatch.setattr("src.training.run.draw_curves", lambda *_: None)
    monkeypatch.setattr("src.evaluation.report.curve_svgs", lambda *_: [])
    flags = good(TRAIN) | {"--quant_mode": "int8", "--samples": "0"}
    code, err = call(TRAIN, words_of(flags))
    assert code == 0 and err.count("note: no effect: --quant_mode") == 1
    for name in ("config.json", "report.html"):
        assert "no effect" not in Path(flags["--proj_dir"], name).read_text()
