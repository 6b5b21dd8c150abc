"""Profiles of RWKV-LM-RLHF for v6, whose LISAProb, LoRAProb and LRScale are not read: they have no rates, so the flags' rule."""

import pytest

from src.adapters.layer_profile import has_rates, read_layer_profile
from src.errors import UserError

OLD = ("LISAProb", "LoRAProb", "LRScale")


def write(folder, header: str, first: str = "0,lora,4,8,", last: str = "head,freeze"):
    path = folder / "profile.csv"
    path.write_text("\n".join(["Layer,Mode,Rank,Alpha," + header, "emb,freeze", first, last]) + "\n")
    return path


@pytest.mark.parametrize("column", [*OLD, *(column.lower() for column in OLD), ",".join(OLD)])
def test_one_of_their_columns_and_no_rates_make_an_old_profile(tmp_path, column):
    path = write(tmp_path, column, "0,lora,4,8" + ",0.5" * len(column.split(",")))
    assert not has_rates(path)
    assert [row.rates("att.key.weight") for row in read_layer_profile(path, 1, (1e-3, 1e-4))] == [(1e-3, 1e-4)] * 3


@pytest.mark.parametrize(("header", "cells"), [
    ("LRScale,Weight_lr_init,Weight_lr_final", "0.5,3e-3,2e-4"), ("Weight_lr_final,Weight_lr_init,LISAProb", "2e-4,3e-3,0.5"),
    ("Weight_lr_init,Weight_lr_final", "3e-3,2e-4")])
def test_rates_that_are_there_are_the_profiles_own(tmp_path, header, cells):
    path = write(tmp_path, header, f"0,lora,4,8,{cells}")
    assert has_rates(path)
    emb, block, head = read_layer_profile(path, 1, (1.0, 2.0))
    assert block.rates("att.key.weight") == (3e-3, 2e-4) and emb.rates("emb.weight") == head.rates("head.weight") == (0, 0)


@pytest.mark.parametrize("header", ["", "LRScale,Weight_lr_init", "LRScale,Weight_lr_final"])
def test_a_rate_that_is_missing_otherwise_is_not_the_flags(tmp_path, header):
    path = write(tmp_path, header, "0,lora,4,8,1,1e-3" if header else "0,lora,4,8")
    assert has_rates(path)
    with pytest.raises(UserError, match="Weight_lr_"):
        read_layer_profile(path, 1, (1.0, 2.0))


def test_what_will_be_refused_counts_as_a_profile_of_its_own(tmp_path):
    for path in (tmp_path / "nowhere.csv", write(tmp_path, "LRScale,Colour")):
        assert has_rates(path)
        with pytest.raises(UserError):
            read_layer_profile(path, 1)
