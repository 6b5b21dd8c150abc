"""Commands, profiles and .save files as the older tools of this family have them."""

import random

import pytest
import torch

from src.adapters.layer_profile import read_layer_profile
from src.checkpoint.base import load_base
from src.checkpoint.io import fingerprint
from src.cli.spellings import ABSENT, IGNORED, RENAMED, SUPPORTED_VALUES, translate
from src.cli.train import parse, parser
from src.errors import UserError
from src.preference.entries import Pair
from src.preference.pairs import has_references, load_pairs
from src.settings import flat
from src.training.module import objective_of
from tests.cli.conftest import words_of
from tests.stored_pairs import stored

NEEDED = ["--load_model", "m.pth", "--rlhf_train_file", "p.save", "--proj_dir", "out", "--accelerator", "cpu"]


def config(*words, needed=NEEDED):
    return parse([*needed, *map(str, words)])[0]


def refusal(*words) -> str:
    with pytest.raises(UserError) as caught:
        config(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_orpo_command_of_rwkv_lm_rlhf():
    # Its x070 example, but for the GPU and what needs one.
    flags = """--load_model m.pth --wandb test --proj_dir out --infctx 0 --vocab_size 65536 --ctx_len 1024 --epoch_steps 100
        --epoch_count 1000 --epoch_begin 0 --epoch_save 1 --micro_bsz 1 --n_layer 24 --n_embd 2048 --lr_init 5e-6 --lr_final 1e-7
        --warmup_steps 100 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8 --accelerator cpu --devices 1 --precision bf16 --grad_cp 1
        --my_testing x070 --strategy auto --layer_profile p.csv --quant 1 --quant_mode nf4 --gpu_arch cuda --orpo 1
        --orpo_alpha 0.006 --rlhf_train_file p.save --rlhf_max_corpus_len 512"""
    made = config(needed=flags.split())
    assert flat(made).items() >= {"loss": "orpo", "orpo_alpha": 0.006, "quantization": "nf4", "rlhf_max_corpus_len": 512}.items()
    assert objective_of(made.objective).alpha == 1.0


def test_everything_that_its_parser_knows_at_its_default(capsys):
    flags = """--load_adapter_pissa_init --random_seed -1 --vocab_size 0 --ctx_len 2048 --infctx 0 --infctx_dataset_multiplier 100
        --chunk_ctx 512 --state 0 --state_output_mode 1 --fla 0 --moe 0 --moe_experts 8 --moe_active 2 --moe_shared 1
        --moe_balance_alpha 0.01 --zerocot 0 --grpo 0 --grpo_gen_count 4 --grpo_gen_length 1024 --grpo_gen_temperature 1.0
        --grpo_gen_topp 0.7 --grpo_kl_beta 0.1 --epoch_steps 1000 --epoch_count 500 --epoch_begin 0 --epoch_save 5 --micro_bsz 1
        --dim_att 0 --dim_ffn 0 --pre_ffn 0 --head_qk 0 --tiny_att_dim 0 --tiny_att_layer -999 --lr_init 1e-4 --lr_final 1e-5
        --lr_advanced 1 --warmup_steps -1 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --grad_cp 1 --dropout 0 --weight_decay_final -1
        --my_pile_edecay 0 --layerwise_lr 1 --ds_bucket_mb 64 --head_size_a 64 --head_size_divisor 8 --magic_prime 0
        --my_random_steps 0 --my_testing x060 --my_exit 99999999 --my_exit_tokens 0 --gpu_arch cuda --quant 1 --quant_mode nf4
        --svd_niter 4 --dpo 0 --simpo 1 --simpo_alpha 0.3 --simpo_beta 0.01 --simpo_gamma 0.00 --orpo 0 --wpo 0 --wpo_alpha 0.3
        --wpo_beta 0.01 --rlhf_max_corpus_len 1024 --distillation 0 --temperature 2.0 --alpha 0.5 --smoothing 0.001 --top_k 100
        --random_mode 1 --optim  --strategy auto --devices 1 --num_nodes 1 --precision fp32 --accumulate_grad_batches 1"""
    made = config(*flags.split())
    assert flat(made).items() >= {"loss": "simpo", "simpo_alpha": 0.3, "warmup_steps": 0, "seed": 0}.items()
    err = capsys.readouterr().err
    assert err.startswith("note: ignored: ") and err.count("\n") == 1
    for flag in ("--magic_prime", "--my_exit_tokens", "--head_size_a", "--fla", "--ds_bucket_mb"):
        assert flag in err


def test_a_lora_command_of_rwkv_peft():
    made = config("--peft", "lora", "--lora_config", '{"lora_load":"","lora_r":8,"lora_alpha":16,"lora_dropout":0}',
                  "--quant", "nf4", "--precision", "bf16-true", "--random_seed", 7, "--train_type", "none", "--fla",
                  "--compile", "--data_type=binidx", "--dataload", "pad", "--grad_clip", 0.5)
    assert (made.model.lora_r, made.model.lora_alpha, made.model.quantization, made.machine.precision) == (8, 16.0, "nf4", "bf16")
    assert made.steps.compile and made.run.seed == 7 and made.steps.gradient_clip_val == 0.5


@pytest.mark.parametrize(("words", "told"), [
    (("--lora_config", '{"lora_dropout": 0.01}'), ("lora_dropout 0.01", "Dropout")),
    (("--lora_config", "r=8"), ("--lora_config", "--lora_r")),
    (("--lora_config", '{"rank": 8}'), ("rank is unknown", "--lora_r")),
    (("--state_tune",), ("--state_tune is", "--peft state", "layer profile")),
    (("--train_type", "state"), ("--peft state", "layer profile")), (("--train_type", "finetune"), ("--peft full",)),
    (("--train_type", "infctx"), ("--train_type infctx", "leave it out", "pieces")),
    (("--loss_mask", "se"), ("--loss_mask se", "leave it out", "columns")),
    (("--loss_mask", "user"), ("--loss_mask user", "--sft_on_prompt 1")),
    (("--peft", "bone", "--bone_config", '{"bone_mode":"bat","bone_r":64}'), ("--bone_config: bone_mode bat", "second version")),
    (("--peft", "pissa", "--pissa_config", '{"pissa_load":"a.pth"}'), ("--pissa_config: pissa_load a.pth", "--load_adapter")),
    (("--peft", "bone", "--bone_config", "[1]"), ("--bone_config [1]", "--lora_r")),
    (("--train_parts", "time,ln"), ("--train_parts time,ln", "FullParts")),
    (("--sft_field", "query", "response"), ("--sft_field query", "prompt and completion")),
    (("--state", "1"), ("--state 1", "layer profile")), (("--wpo", "1"), ("--wpo 1", "--loss")),
    (("--grpo", "1"), ("--grpo 1",)), (("--distillation", "1"), ("--distillation 1",)), (("--moe", "1"), ("--moe 1",)),
    (("--dropout", "0.1"), ("--dropout 0.1", "Dropout")), (("--weight_decay", "0.1"), ("--weight_decay 0.1", "Weight_decay")),
    (("--limited_lora", "0"), ("--limited_lora 0",)), (("--orpo_mode", "0"), ("--orpo_mode 0", "mode 1")),
    (("--num_nodes", "2"), ("--num_nodes 2",)), (("--train_stage", "1"), ("--train_stage 1",)),
    (("--quant", "4bit"), ("--quant", "takes 0 or 1")), (("--no_such_flag", "1"), ("--no_such_flag",)),
])
def test_what_would_change_the_result_is_refused(words, told):
    message = refusal(*words)
    for word in told:
        assert word in message


@pytest.mark.parametrize(("words", "name", "value", "count"), [
    ("--warmup_steps 100 --warmup_steps -1", "warmup_steps", 0, "--warmup_steps (2 times)"),
    ("--warmup_steps -1 --warmup_steps 100", "warmup_steps", 100, "--warmup_steps (2 times)"),
    ("--warmup_steps 9 --warmup_steps=-1 --warmup_steps 7 --warmup_steps -1", "warmup_steps", 0, "--warmup_steps (4 times)"),
    ("--random_seed 5 --random_seed -1", "seed", 0, "--seed (2 times)"),
    ("--seed 5 --random_seed -1", "seed", 0, "--seed (2 times)"), ("--random_seed -1 --seed 5", "seed", 5, "--seed (2 times)"),
    ("--optim adamw_8bit --optim none", "optim", "adamw", "--optim (2 times)"),
    ("--quant 1 --quant_mode int8 --quant_mode none", "quantization", "nf4", "--quant_mode (2 times)"),
    ("--quant nf4 --quant 0", "quantization", None, "--quant (2 times)"),
    ("--peft disha --peft dora", "peft", "dora", "--peft (2 times)"),
    ("--compile 0 --compile", "compile", True, "--compile (2 times)"),
])
def test_the_last_mention_counts_whatever_it_says(words, name, value, count):
    made, _, notes = parse([*NEEDED, *words.split()])
    assert flat(made)[name] == value
    assert f"note: given more than once, the last one counts: {count}" in notes


def test_the_last_mention_of_what_has_another_name_here_counts():
    _, expected, notes = parse([*NEEDED, "--vocab_size", "9", "--vocab_size", "0"])
    assert expected["--vocab_size"] is None and "--vocab_size (2 times)" in notes[-1]
    made, _, notes = parse([*SFT, "--loss_mask", "pad", "--loss_mask", "qa"])
    assert not made.objective.sft_on_prompt and "--loss_mask (2 times)" in notes[-1]
    made, _, notes = parse([*NEEDED, "--lora_config", '{"lora_r":8,"lora_alpha":16}', "--lora_config", '{"lora_r":4}'])
    assert (made.model.lora_r, made.model.lora_alpha) == (4, 32.0) and "--lora_config (2 times)" in notes[-1]


@pytest.mark.parametrize(("flag", "values"), [
    ("--vocab_size", ("0_0", "٠", " 0")), ("--warmup_steps", (" -1 ", "-1_0", "−1")), ("--dropout", ("0_0", "1e-400", "٠", " 0")),
    ("--random_seed", ("-1 ", "-１")), ("--compile", ("",)), ("--weight_decay_final", ("-1 ",))])
def test_a_value_that_stands_for_absence_is_a_number_as_every_other(flag, values):
    for value in values:
        assert RENAMED.get(flag, flag) in refusal(f"{flag}={value}")


SFT = ["--load_model", "m.pth", "--sft", "1", "--train_data_file", "t.jsonl", "--proj_dir", "out", "--accelerator", "cpu"]


def test_loss_masks_of_rwkv_peft(capsys):
    """`qa` is the answers, which is ours by itself; `none` and `pad` are every token of a text."""
    assert not config("--loss_mask", "qa", needed=SFT).objective.sft_on_prompt
    for value in ("none", "pad"):
        assert config("--loss_mask", value, needed=SFT).objective.sft_on_prompt
        assert config(f"--loss_mask={value}", needed=SFT).objective.sft_on_prompt
        assert not config("--loss_mask", value, "--sft_on_prompt", "0", needed=SFT).objective.sft_on_prompt  # our own flag rules
    assert capsys.readouterr().err == ""
    # A preference loss has no such mask, and its share of SFT loss stays as it is.
    for value in ("none", "pad", "qa"):
        assert not config("--loss_mask", value).objective.sft_on_prompt
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and err.count("--loss_mask (a preference loss is over the answers)") == 2


def test_data_types_of_rwkv_peft(capsys):
    for value in ("utf-8", "jsonl", "sft", "binidx"):
        config("--data_type", value, needed=SFT)
        assert capsys.readouterr().err == "note: ignored: --data_type (a file's ending says what it holds)\n"
    for value in ("numpy", "uint16", "utf-16le", "dummy"):
        with pytest.raises(UserError, match=f"--data_type {value} is not supported; give the texts themselves"):
            config("--data_type", value, needed=SFT)


def test_adapters_of_rwkv_peft_have_their_own_rank(capsys):
    for peft, flag, value, mode in (
            ("bone", "--bone_config", '{"bone_mode":"bone","bone_load":"","bone_r":64}', "bone"),
            ("disha", "--disha_config", '{"mode":"bone","load":"","r":64}', "bone"),
            ("pissa", "--pissa_config", '{"pissa_load":"","pissa_init":"","pissa_r":64,"svd_niter":4}', "pissa")):
        made = config("--peft", peft, flag, value)
        assert (made.model.peft, made.model.lora_r) == (mode, 64)
    assert capsys.readouterr().err == ""
    made = config("--lora_config", '{"lora_r":8,"lora_alpha":16}', "--bone_config", '{"bone_r":64}')
    assert (made.model.peft, made.model.lora_r, made.model.lora_alpha) == ("lora", 8, 16.0)
    made = config("--peft", "bone", "--lora_config", '{"lora_r":8,"lora_dropout":0.01}')
    assert made.model.lora_r == 16
    assert capsys.readouterr().err.count("(it belongs to a feature that is not switched on)\n") == 2


def test_harmless_values_pass_and_numbers_are_compared_by_value(capsys):
    config("--lora", "--dropout", "0.0", "--limited_lora", "1", "--orpo_mode=1", "--my_pos_emb", "0", "--lora_load", "")
    assert capsys.readouterr().err == ""


def test_flags_that_train_has_are_its_own_whatever_the_tables_say():
    assert translate(["--state", "1", "--fla=1"], {"--state", "--fla"})[0] == ["--state", "1", "--fla=1"]
    own = parser().flags()
    assert set(RENAMED.values()) - {"--train_data_file"} <= own
    flags = [flag for group in IGNORED.values() for flag in group]
    assert len(flags) == len(set(flags)) and not set(flags) & (own | set(SUPPORTED_VALUES) | set(RENAMED) | set(ABSENT))
    assert not set(SUPPORTED_VALUES) & own


def test_loss_and_switches():
    assert {config(*words).objective.loss for words in ((), ("--dpo", 1), ("--loss", "dpo", "--dpo", 1))} == {"dpo"}
    assert config("--dpo", 0, "--orpo", 1).objective.loss == config("--loss", "orpo").objective.loss == "orpo"
    assert "contradict" in refusal("--dpo", 1, "--orpo", 1) and "contradict" in refusal("--loss", "ipo", "--dpo", 1)
    assert "--dpo 0" in refusal("--dpo", 0) and "--loss" in refusal("--loss", "kot")
    assert "--simpo_gamma is not used by --loss dpo" in refusal("--simpo_gamma", 1)
    assert "--label_smoothing is not used by --loss hinge" in refusal("--loss", "hinge", "--label_smoothing=0.1")
    assert "needs --label_smoothing" in refusal("--loss", "robust")
    for value in (0.5, -0.1, "nan"):
        assert "--label_smoothing" in refusal("--label_smoothing", value)
    for flag, value in (("--orpo_alpha", 0), ("--simpo_gamma", -1), ("--simpo_beta", "inf"), ("--cpo_alpha", "nan")):
        assert flag in refusal("--loss", flag[2:].partition("_")[0], flag, value)
    made = objective_of(config("--loss", "robust", "--dpo_beta", 0.2, "--dpo_alpha", 0, "--label_smoothing", 0.1).objective)
    assert (made.numbers, made.alpha, made.loss) == ({"beta": 0.2, "label_smoothing": 0.1}, 0.0, "robust")
    made = objective_of(config("--simpo", 1, "--simpo_beta", 3, "--simpo_gamma", 0.5).objective)
    assert (made.numbers, made.alpha) == ({"beta": 3.0, "gamma": 0.5, "label_smoothing": 0.0}, 0.0)


V6_PROFILE = """Layer,Mode,Rank,Alpha,Dropout,LISAProb,LoRAProb,LRScale
emb,freeze,0,0,,1,,1
0,lora,64,128,0.01,1,,1
1,freeze,64,,,,,
head,lora,64,128,0.01,1,,1
"""
V7_PROFILE = """Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts
emb,freeze,0,0,0.01,0.00001,0.000001,0,0.05,0.01,
0,lora,32,64,0.01,1.00E-05,1.00E-06,0,0.05,0.01,
1,full,16,32,0.01,3.00E-05,1.00E-05,0,0.05,0.01,"ln,x_r,ffn.x_k"
head,lora,64,128,0.01,1.00E-05,1.00E-06,0,0.05,0.01,
"""


def test_profiles_of_rwkv_lm_rlhf(tmp_path):
    (tmp_path / "v7.csv").write_text(V7_PROFILE)
    settings = read_layer_profile(tmp_path / "v7.csv", 2, (1.0, 2.0))
    assert [setting.mode for setting in settings] == ["freeze", "lora", "full", "lora"]
    assert (settings[1].rank, settings[1].alpha, settings[1].weight_lr_init, settings[1].weight_lr_final) == (32, 64, 1e-5, 1e-6)
    assert settings[2].reject_parts == ("ln", "x_r", "ffn.x_k") and settings[1].state_lr_init == 0.05
    # Those for v6 have no rates: the flags' rule.
    (tmp_path / "v6.csv").write_text(V6_PROFILE)
    settings = read_layer_profile(tmp_path / "v6.csv", 2, (1e-4, 1e-5))
    assert [setting.mode for setting in settings] == ["freeze", "lora", "freeze", "lora"]
    assert (settings[3].rank, settings[3].alpha, settings[3].dropout) == (64, 128, 0.01)
    assert {(setting.weight_lr_init, setting.weight_lr_final) for setting in settings} == {(1e-4, 1e-5)}
    (tmp_path / "none.csv").write_text(V6_PROFILE.replace(",LISAProb,LoRAProb,LRScale", ",,,"))
    with pytest.raises(UserError, match="Weight_lr_init is empty"):
        read_layer_profile(tmp_path / "none.csv", 2)


@pytest.mark.parametrize("mode", ["freeze", "full", "lora", "dora", "pissa", "bone"])
def test_modes_of_its_profiles_for_blocks_and_head(mode, tmp_path):
    """All that its profiler knows, each with the columns it fills in whether the mode uses them or not."""
    row = f"{mode},64,128,0.01,1.00E-05,0.00001,0.001,0.05,0.01,"
    rows = ["emb,freeze,0,0,0.01,0.00001,0.00001,0.001,0.05,0.01,", f"0,{row}", f'1,{row}"ln,x_r,ffn.key"', f"head,{row}"]
    (tmp_path / "p.csv").write_text("\n".join([V7_PROFILE.partition("\n")[0], *rows]))
    settings = read_layer_profile(tmp_path / "p.csv", 2)
    assert [setting.mode for setting in settings] == ["freeze", mode, mode, mode]
    for setting in settings[1:]:
        assert (setting.rank, setting.alpha, setting.dropout, setting.weight_decay) == (64, 128, 0.01, 0.001)
        assert setting.rates("head.weight") == (1e-5, 1e-5) and setting.rates("att.time_state") == (0.05, 0.01)
    assert settings[2].reject_parts == ("ln", "x_r", "ffn.key")


@pytest.mark.parametrize(("text", "told"), [
    ("Position,Value\n1,0\n2,1\n", "unknown column 'Position'"),  # what came before its layer profiles
    (V7_PROFILE.replace("emb,freeze", "emb,lora"), "mode lora is not for emb; choose one of freeze, full"),
])
def test_what_its_profiles_say_that_is_not_supported_is_one_line(text, told, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read_layer_profile(tmp_path / "p.csv", 2)
    assert "\n" not in str(caught.value)


def test_its_profiles_for_states_freeze_every_layer_and_are_refused_with_the_mode(call, good, tmp_path):
    """There --state 1 trains the states besides, at the profile's State_lr."""
    frozen = "".join(f"{layer},freeze,128,32,0.01,0.0001,0.00001,0,1.00E-02,0.00001,\n" for layer in ("emb", 0, 1, "head"))
    (tmp_path / "p.csv").write_text(V7_PROFILE.partition("\n")[0] + "\n" + frozen)
    code, err = call("train", words_of(good("train") | {"--layer_profile": str(tmp_path / "p.csv")}))
    assert code == 2 and err.count("\n") == 1 and "nothing to train" in err and "or state" in err
    states = frozen.replace("0,freeze", "0,state", 1).replace("1,freeze", "1,state", 1)
    (tmp_path / "p.csv").write_text(V7_PROFILE.partition("\n")[0] + "\n" + states)
    code, _ = call("train", words_of(good("train") | {"--layer_profile": str(tmp_path / "p.csv")}))
    assert code == 0


def as_upstream_writes(path, reference):
    """Its loop: tuples of the tokenizer's lists and Python floats, shuffled, torch.save."""
    trainset = []
    for number in range(20):
        prompt, chosen, reject = [85, 115, number], [32, 65 + number, 10, 10], [32, 66, 10, 10]
        trainset.append((prompt, chosen, reject, reference(number), reference(number + 1)))
    random.Random(100).shuffle(trainset)
    torch.save(trainset, path)
    return trainset


def test_saves_of_rwkv_lm_rlhf(call, good, tmp_path):
    path = tmp_path / "theirs.save"
    trainset = as_upstream_writes(path, lambda number: -1.5 - number)
    pairs, sidecar, _ = load_pairs(path, 256, 512)
    assert pairs == [Pair(*pair) for pair in trainset] and sidecar is None and has_references(pairs, None)
    code, err = call("train", words_of(good("train") | {"--rlhf_train_file": str(path)}))
    assert code == 0 and err.startswith("warning: ")


def test_its_saves_for_orpo_have_no_references(call, good, tmp_path):
    path = tmp_path / "orpo.save"
    pairs = as_upstream_writes(path, lambda _: 0.5)
    assert not has_references(stored([Pair(*pair) for pair in pairs]), None)
    flags = good("train") | {"--rlhf_train_file": str(path)}
    code, err = call("train", words_of(flags))
    assert code == 2 and "made without references" in err and "--loss dpo needs" in err
    code, err = call("train", words_of(flags | {"--orpo": "1"}))
    assert code == 0 and "warning" not in err


def test_checkpoints_of_its_trainer_under_deepspeed(material, tmp_path):
    weights = torch.load(material / "x070.pth", weights_only=True)
    torch.save({f"_forward_module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "rwkv-5.pth")
    loaded, dimensions = load_base(tmp_path / "rwkv-5.pth")
    assert dimensions == load_base(material / "x070.pth")[1] and fingerprint(loaded) == fingerprint(weights)
