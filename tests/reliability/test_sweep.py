"""Every flag of every script with odd values: exit code 0, or 2 and one line, and nothing written that was not asked for."""

import random

import pytest

from tests.reliability.sweep import flags, try_value, values
from tests.reliability.warm import SCRIPTS

SEED, FEW = 3, 12
OF_SFT = ("--train_data_file", "--eval_file", "--tokenizer", "--template", "--loss_on", "--sft_on_prompt", "--skip_bad_rows")


@pytest.fixture(scope="session")
def elsewhere(workplace):
    folder = workplace / "so" / "deep" / "that" / "elsewhere"  # "../.." is tried, too
    folder.mkdir(parents=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script in SCRIPTS for flag in flags(script)])
def test_a_flag_with_odd_values(run, jobs, elsewhere, script, flag):
    wrong = [line for value in values(flag) for line in try_value(run, jobs[script], flag, value, elsewhere)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("flag", OF_SFT)
def test_a_flag_of_sft_with_odd_values(run, jobs, inputs, elsewhere, flag):
    csv, kept = str(inputs / "pairs.csv"), {name: value for name, value in jobs["train"].flags.items() if "sample" not in name}
    del kept["--rlhf_train_file"]
    job = jobs["train"]._replace(flags=kept | {"--sft": "1", "--train_data_file": csv, "--eval_file": csv})
    wrong = [line for value in values(flag) for line in try_value(run, job, flag, value, elsewhere)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_few_flags_with_odd_values(run, jobs, elsewhere, script):
    draw = random.Random(SEED)
    cases = draw.sample([(flag, value) for flag in flags(script) for value in values(flag)], FEW)
    wrong = [line for flag, value in cases for line in try_value(run, jobs[script], flag, value, elsewhere)]
    assert not wrong, "\n".join(wrong)
