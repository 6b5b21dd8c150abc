"""Profiles: what is written is what is read, the shipped ones hold what they promise, and every slip is named."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.adapters.layer_profile import (
    BLOCK_MODES,
    COLUMNS,
    LayerSetting,
    auto_layer_profile,
    layer_of,
    read_layer_profile,
    setting_of,
    with_rates,
)
from src.errors import UserError

SHIPPED = Path(__file__).parents[2] / "layerprofile"
HEADER = "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts"
LORA = "lora,16,32,0.01,1e-4,1e-5,0.01,0,0,"
FREEZE = "freeze,,,,,,,,,"


def profile_text(rows: list[str], header: str = HEADER) -> str:
    return "\n".join([header, *rows]) + "\n"


GOOD = [f"emb,{FREEZE}", f"0,{LORA}", f"1,{LORA}", f"head,{FREEZE}"]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "profile.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


rates = st.just(0.0) | st.floats(1e-12, 10)


@st.composite
def profiles(draw) -> list[LayerSetting]:
    def setting(layer: str) -> LayerSetting:
        modes = ["freeze", "full", *([] if layer == "emb" else ["lora", "dora", "pissa", "bone"])]
        mode = draw(st.sampled_from([*modes, *(["state"] if layer.isdigit() else [])]))
        parts, full = (tuple(draw(st.lists(st.sampled_from(["att.receptance", "ffn.value", "time_maa", "ln1"]), max_size=3)))
                       for _ in range(2))
        dropout = draw(st.just(0.0) | st.floats(1e-12, 0.99))
        return LayerSetting(layer, mode, draw(st.integers(1, 512)), draw(st.floats(0.5, 64)), dropout,
                            *(draw(rates) for _ in range(5)), reject_parts=parts, full_parts=full)

    return [setting(layer) for layer in ("emb", *map(str, range(draw(st.integers(1, 4)))), "head")]


@settings(max_examples=60)
@given(profile=profiles(), data=st.data())
def test_round_trip_in_any_order_case_and_line_end(tmp_path_factory, profile, data):
    order = data.draw(st.permutations(range(len(COLUMNS))))
    header = [data.draw(st.sampled_from([str.lower, str.upper, str]))(COLUMNS[i]) for i in order]
    values = [[s.layer, s.mode, s.rank, repr(s.alpha), repr(s.dropout), repr(s.weight_lr_init), repr(s.weight_lr_final),
               repr(s.weight_decay), repr(s.state_lr_init), repr(s.state_lr_final), ",".join(s.reject_parts),
               ",".join(s.full_parts)] for s in profile]
    path = tmp_path_factory.mktemp("profile") / "profile.csv"
    with path.open("w", encoding=data.draw(st.sampled_from(["utf-8", "utf-8-sig"])), newline="") as file:
        writer = csv.writer(file, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
        writer.writerow(header)
        for row in data.draw(st.permutations(values)):
            writer.writerow([row[i] for i in order])
            if data.draw(st.booleans()):
                writer.writerow([])
    assert read_layer_profile(path, len(profile) - 2) == profile


@settings(max_examples=150)
@given(text=st.one_of(st.binary(max_size=200), st.text(alphabet="emb,head01lora\"\n 9.-", max_size=120).map(
    lambda rows: f"{HEADER}\n{rows}".encode())))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, text):
    path = write(tmp_path_factory.mktemp("profile"), text)
    try:
        read_layer_profile(path, 1)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error).replace(str(path), "")


def test_missing_columns_that_no_mode_needs_count_as_zero(tmp_path):
    text = profile_text(["emb,freeze", "0,LoRA,16.0,32,1e-4,1e-5,", "head,full,,,1e-6,1e-6,,", "", ",,"],
                        "layer,mode,rank,alpha,weight_lr_init,weight_lr_final")
    assert read_layer_profile(write(tmp_path, text), 1) == [
        LayerSetting("emb", "freeze"), LayerSetting("0", "lora", 16, 32.0, weight_lr_init=1e-4, weight_lr_final=1e-5),
        LayerSetting("head", "full", weight_lr_init=1e-6, weight_lr_final=1e-6)]


def test_zero_is_written_in_many_ways_and_the_bounds_belong_to_what_is_taken(tmp_path):
    rows = [GOOD[0], "0,lora,16.0,1e-6,-0,0e-400,+0.0,.0,000,1e6,",
            "1,lora,65536,1000000,0.9999999,1e-12,1e6,1e-12,0.,-0E9,", GOOD[3]]
    first, second = read_layer_profile(write(tmp_path, profile_text(rows)), 2)[1:3]
    assert first == LayerSetting("0", "lora", 16, 1e-6, state_lr_final=1e6) and "-0.0" not in str(first)
    assert second == LayerSetting("1", "lora", 65536, 1e6, 0.9999999, 1e-12, 1e6, 1e-12) and "-0.0" not in str(second)


def test_a_rank_is_from_1_to_65536(tmp_path):
    def rank(cell: str) -> int:
        rows = [GOOD[0], f"0,bone,{cell},,,1e-4,1e-5,,,,", *GOOD[2:]]
        return read_layer_profile(write(tmp_path, profile_text(rows)), 2)[1].rank

    assert (rank("1"), rank("65536")) == (1, 65536)
    for cell in ("0", "65537"):
        with pytest.raises(UserError, match="Rank"):
            rank(cell)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    expected = read_layer_profile(write(tmp_path, profile_text(GOOD)), 2)
    assert read_layer_profile(write(tmp_path, profile_text(GOOD).encode("utf-8-sig")), 2) == expected


def test_spaces_around_cells_and_lone_line_ends_do_not_matter(tmp_path):
    rows = ["emb ,freeze", ' 0, LoRA , 16, 32, , 1e-4, 1e-5, , , , "ln , att.key"', f"1,{LORA}", "\thead,freeze"]
    expected = read_layer_profile(write(tmp_path, profile_text(
        ["emb,freeze", '0,lora,16,32,,1e-4,1e-5,,,,"ln,att.key"', f"1,{LORA}", "head,freeze"])), 2)
    assert expected[1].reject_parts == ("ln", "att.key")
    for end in ("\n", "\r\n", "\r"):
        assert read_layer_profile(write(tmp_path, profile_text(rows).replace("\n", end)), 2) == expected


def test_titles_that_a_spreadsheet_left_empty_have_no_effect(tmp_path):
    rows = [f"{row},{note}" for row, note in zip(GOOD, ("", "a note", "", "x"), strict=True)]
    assert read_layer_profile(write(tmp_path, profile_text(rows, f"{HEADER},")), 2) == read_layer_profile(
        write(tmp_path, profile_text(GOOD)), 2)


def test_reject_parts_are_split_and_stripped(tmp_path):
    rows = [GOOD[0], f'0,{LORA}"att.receptance, ffn.value ,"', GOOD[2], f"head,{FREEZE}"]
    assert read_layer_profile(write(tmp_path, profile_text(rows)), 2)[1].reject_parts == ("att.receptance", "ffn.value")


def test_a_part_rejects_the_names_it_occurs_in():
    setting = LayerSetting("0", "full", reject_parts=("att.key", "time_maa"))
    assert setting.rejects("att.key.weight") and setting.rejects("att.time_maa_w1") and setting.rejects("ffn.time_maa_k")
    assert not setting.rejects("ffn.key.weight") and not setting.rejects("ln1.weight")


@pytest.mark.parametrize(("text", "n_layer", "said"), [
    ("", 2, ["empty"]),
    ("\n\n", 2, ["empty"]),
    (profile_text(GOOD, "Layer,Mode,Rang" + HEADER[len("Layer,Mode,Rank"):]), 2, ["'Rang'"]),
    (profile_text(GOOD, HEADER.replace("State_lr_final", "Rank")), 2, ["Rank", "twice"]),
    (profile_text(GOOD, HEADER.replace("Mode", "")), 2, ["no column Mode"]),
    (profile_text(GOOD, HEADER.replace("Layer", "")), 2, ["no column Layer"]),
    (profile_text(GOOD, f"{HEADER},mode"), 2, ["column Mode", "twice"]),
    (profile_text(["emb"], "Layer,Mode"), 2, ["line 2", "layer emb", "unknown mode ''"]),
    (profile_text(["freeze"], "Mode,Layer"), 2, ["line 2", "layer ''"]),
    (profile_text([row for row in GOOD if row[0] != "1"]), 2, ["no row for layer 1"]),
    (profile_text(GOOD[1:]), 2, ["no row for layer emb"]),
    (profile_text(GOOD[:3]), 2, ["no row for layer head"]),
    (profile_text(GOOD), 3, ["no row for layer 2"]),
    (profile_text(GOOD), 1, ["line 4", "layer 1 ", "1 layers"]),
    (profile_text([*GOOD, f"1,{LORA}"]), 2, ["line 6", "layer 1", "twice"]),
    (profile_text([*GOOD, f"01,{LORA}"]), 2, ["line 6", "layer 1", "twice"]),
    (profile_text([*GOOD, f"-1,{LORA}"]), 2, ["line 6", "'-1'"]),
    (profile_text([*GOOD, f"{'9' * 5000},{LORA}"]), 2, ["line 6"]),
    (profile_text([*GOOD, f"tail,{LORA}"]), 2, ["line 6", "'tail'"]),
    (profile_text([f"emb,{LORA}", *GOOD[1:]]), 2, ["line 2", "layer emb", "mode lora", "one of freeze, full"]),
    (profile_text([*GOOD[:3], "head,lora,16,32,0,1e-4,1e-5,0,0,0,att.key,ffn.key"]), 2, ["line 5", "quotes"]),
    (profile_text([*GOOD, "nothing"]).encode() + b"\xff\n", 2, ["UTF-8"]),
] + [
    (profile_text([GOOD[0], f"0,{cells}", *GOOD[2:]]), 2, ["line 3", "layer 0", *said]) for cells, said in [
        ("dora,16,,0,1e-4,1e-5,0,0,0,", ["Alpha is empty", "mode dora"]),
        ("bone,,32,0,1e-4,1e-5,0,0,0,", ["Rank is empty", "mode bone"]),
        ("miss,0,,0,1e-4,1e-5,0,0,0,", ["Rank must be above 0", "mode bone"]),
        ("pissa,16,,0,,1e-5,0,0,0,", ["Weight_lr_init is empty"]),
        ("state,,,,,,,,1e-3,", ["State_lr_init is empty", "mode state"]),
        ("lara,16,32,0,1e-4,1e-5,0,0,0,", ["unknown mode 'lara'", "freeze, full, lora, dora, pissa, bone, state"]),
        (",16,32,0,1e-4,1e-5,0,0,0,", ["unknown mode ''"]),
        ("lora,,32,0,1e-4,1e-5,0,0,0,", ["Rank", "empty"]),
        ("lora,16,,0,1e-4,1e-5,0,0,0,", ["Alpha", "empty"]),
        ("lora,0,32,0,1e-4,1e-5,0,0,0,", ["Rank", "above 0"]),
        ("lora,16,0,0,1e-4,1e-5,0,0,0,", ["Alpha", "above 0"]),
        ("lora,1.5,32,0,1e-4,1e-5,0,0,0,", ["Rank", "1.5", "whole"]),
        ("lora,-4,32,0,1e-4,1e-5,0,0,0,", ["Rank", "-4"]),
        ("lora,many,32,0,1e-4,1e-5,0,0,0,", ["Rank", "'many'"]),
        ("lora,16,32,1,1e-4,1e-5,0,0,0,", ["Dropout is 1; it must be 0 or a number from 1e-12 to 0.9999999"]),
        ("lora,16,32,0,,1e-5,0,0,0,", ["Weight_lr_init", "empty"]),
        ("full,16,32,0,1e-4,,0,0,0,", ["Weight_lr_final", "empty"]),
        ("lora,16,32,0,-1e-4,1e-5,0,0,0,", ["Weight_lr_init", "-1e-4"]),
        ("lora,16,32,0,1e-4,nan,0,0,0,", ["Weight_lr_final", "nan"]),
        ("lora,16,32,0,1e-4,1e400,0,0,0,", ["Weight_lr_final is 1e400; it must be 0 or a number from 1e-12 to 1000000"]),
        ("lora,16,32,0,1e-4,infinity,0,0,0,", ["Weight_lr_final is 'infinity', not a number"]),
        ("lora,１,32,0,1e-4,1e-5,0,0,0,", ["Rank is '１', not a number"]),
        ("lora,16,32,0,1e-400,1e-5,0,0,0,", ["Weight_lr_init is '1e-400', not a number, or one too close to 0"]),
        ("lora,0x10,32,0,1e-4,1e-5,0,0,0,", ["Rank is '0x10', not"]), ("lora,1_0,32,0,1e-4,1e-5,0,0,0,", ["Rank is '1_0', not"]),
        ("lora,1e12,32,0,1e-4,1e-5,0,0,0,", ["Rank is 1e12; it must be 0 or a number from 1 to 65536"]),
        ("lora,16,1e30,0,1e-4,1e-5,0,0,0,", ["Alpha is 1e30; it must be 0 or a number from 1e-06 to 1000000"]),
        ("lora,16\0,32,0,1e-4,1e-5,0,0,0,", ["Rank is '16\\x00', not"]),
        ("lo\0ra,16,32,0,1,1,0,0,0,", ["unknown mode 'lo\\x00ra'"]),
        (f"lora,{'9' * 5000},32,0,1,1,0,0,0,", ["Rank is 9999"]), (f"{'x' * 5000},16,32,0,1,1,0,0,0,", ["unknown mode 'xxx"]),
        ("lora,16,32,0,1e-4,1e-5,inf,0,0,", ["Weight_decay", "inf"]),
        ("lora,16,32,0,1e-4,1e-5,0,x,0,", ["State_lr_init", "'x'"]),
        (f"lora,16,32,0,1e-4,0.{'0' * 400}1,0,0,0,", ["Weight_lr_final is '0.000", "too close to 0"]),
        ("lora,16,32,0,1e-300,1e-5,0,0,0,", ["Weight_lr_init is 1e-300; it must be 0 or a number from 1e-12 to 1000000"]),
        ("lora,16,32,0,1e300,1e-5,0,0,0,", ["Weight_lr_init is 1e300"]),
        ("lora,16,1e-320,0,1e-4,1e-5,0,0,0,", ["Alpha is 1e-320; it must be 0 or a number from 1e-06"]),
        ("lora,16,32,1e-300,1e-4,1e-5,0,0,0,", ["Dropout is 1e-300"]),
        ("lora,16,32,0.99999999,1,1,0,0,0,", ["Dropout is 0.99999999"]),
        ("lora,16,32,0,1e-4,1e-5,1e308,0,0,", ["Weight_decay is 1e308"]), ("state,,,,,,,1e-13,1,", ["State_lr_init is 1e-13"]),
        ("state,,,,,,,1,2e6,", ["State_lr_final is 2e6"]),
        ("lora,1e-5,32,0,1e-4,1e-5,0,0,0,", ["Rank is 1e-5; it must be 0 or a"]),
        ("freeze,16,32,0,1e-4,1e-5,0,0,-1,", ["State_lr_final", "-1"]),
    ]
])
def test_every_slip_is_named(tmp_path, text, n_layer, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_layer_profile(path, n_layer)
    assert all(part in str(caught.value) for part in [str(path), *said]), str(caught.value)


def test_the_head_has_every_mode_but_a_state(tmp_path):
    for mode in ("freeze", "full", "lora", "dora", "pissa", "bone"):
        path = write(tmp_path, profile_text([*GOOD[:3], f"head,{mode},16,32,0,1e-4,1e-5,0,1e-3,1e-4,"]))
        assert read_layer_profile(path, 2)[-1].mode == mode
    path = write(tmp_path, profile_text([*GOOD[:3], "head,state,16,32,0,1e-4,1e-5,0,1e-3,1e-4,"]))
    with pytest.raises(UserError, match="line 5 .layer head.: mode state is not for head; choose one of freeze, full, lora"):
        read_layer_profile(path, 2)


def test_the_names_that_bone_has_had(tmp_path):
    path = write(tmp_path, profile_text([GOOD[0], "0,MiSS,16,,0,1e-4,1e-5,0,,,", "1,disha,16,,0,1e-4,1e-5,0,,,", GOOD[3]]))
    assert [setting.mode for setting in read_layer_profile(path, 2)] == ["freeze", "bone", "bone", "freeze"]


def test_full_parts_need_the_weights_rates_in_any_mode(tmp_path):
    header = f"{HEADER},FullParts"
    good = [f"emb,{FREEZE},", '0,freeze,,,,1e-5,1e-6,,,,,"ln, att.w0"', "1,state,,,,1e-5,1e-6,,1,0.1,,ln", f"head,{FREEZE},"]
    settings = read_layer_profile(write(tmp_path, profile_text(good, header)), 2)
    assert settings[1].full_parts == ("ln", "att.w0") and settings[2].rates("att.time_state") == (1, 0.1)
    assert settings[1].in_full("ln1.weight") and not settings[1].in_full("att.key.weight")
    for row, said in (("1,freeze,,,,,1e-6,,,,,ln", "Weight_lr_init"), ("1,state,,,,1e-5,,,1,0.1,,ln", "Weight_lr_final")):
        with pytest.raises(UserError, match=f"line 4 .layer 1.: {said} is empty, and FullParts needs it"):
            read_layer_profile(write(tmp_path, profile_text([*good[:2], row, good[3]], header)), 2)


def test_a_rejected_part_rules_over_a_full_one():
    setting = LayerSetting("0", "lora", 4, 8.0, reject_parts=("att.key", "ln_x"), full_parts=("ln", "ffn.value", "att.key"))
    assert [setting.in_full(name) for name in ("ln1.bias", "att.ln_x.bias", "ffn.value.weight", "att.key.weight")] == [
        True, False, True, False]
    assert setting.adapter("ffn.key.weight") and not setting.adapter("ffn.value.weight") and not setting.adapter("att.key.weight")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv does not exist"):
        read_layer_profile(tmp_path / "nowhere.csv", 2)


@pytest.mark.parametrize("n_layer", [1, 5, 61])
def test_the_automatic_profile(n_layer):
    profile = auto_layer_profile(n_layer, 3e-4, 2e-4, rank=8, alpha=4.0)
    assert [s.layer for s in profile] == ["emb", *map(str, range(n_layer)), "head"]
    assert [s.mode for s in profile] == ["freeze", *["lora"] * n_layer, "freeze"]
    assert {(s.rank, s.alpha, s.weight_lr_init, s.weight_lr_final) for s in profile[1:-1]} == {(8, 4.0, 3e-4, 2e-4)}


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_the_automatic_profile_has_the_rates_of_its_mode(mode):
    profile = auto_layer_profile(2, 3e-4, 2e-4, mode=mode)
    assert [s.mode for s in profile] == ["freeze", mode, mode, "freeze"]
    assert profile[1].rates("att.time_state" if mode == "state" else "att.key.weight") == (3e-4, 2e-4)


@pytest.mark.parametrize("n_layer", [12, 24, 32])
def test_the_shipped_profiles_are_the_automatic_one_at_ten_times_the_usual_rates(n_layer):
    profile = read_layer_profile(SHIPPED / f"{n_layer}_TEST.csv", n_layer)
    assert profile == auto_layer_profile(n_layer, 5e-5, 1e-5)


def test_with_rates_changes_the_rates_alone():
    before = [replace(s, weight_decay=0.5) for s in auto_layer_profile(2, 1.0, 1.0)]
    after = with_rates(before, 5e-6, 1e-6)
    assert {s.rates(name) for s in after for name in ("att.time_state", "ln1.weight")} == {(5e-6, 1e-6)}
    none = dict.fromkeys(("weight_lr_init", "weight_lr_final", "state_lr_init", "state_lr_final"), 0)
    assert [replace(s, **none) for s in after] == [replace(s, **none) for s in before]


@pytest.mark.parametrize(("name", "layer", "local_name"), [
    ("emb.weight", "emb", "emb.weight"), ("blocks.3.att.key.weight", "3", "att.key.weight"),
    ("blocks.12.ln1.bias", "12", "ln1.bias"), ("blocks.0.ln0.weight", "0", "ln0.weight"),
    ("ln_out.bias", "head", "ln_out.bias"), ("head.lora_A", "head", "head.lora_A")])
def test_layer_of(name, layer, local_name):
    assert layer_of(name) == (layer, local_name)


@pytest.mark.parametrize(("data", "words"), [
    (profile_text(GOOD).encode("utf-16"), "not a CSV in UTF-8"), (b"\xff\xfe", "not a CSV in UTF-8"),
    (profile_text([*GOOD[:3], 'head,freeze,,,,,,,,,"ln, att']).encode(), "line 5: not a CSV (unexpected end of data)"),
    (profile_text([*GOOD[:3], f"head,{'x' * 200_000}"]).encode(), "line 5: not a CSV (field larger than"),
    (profile_text([*GOOD, *["1,freeze,,,,,,,,,"] * 1_000_000]).encode(), "but a profile has one row a layer"),
    (b"x" * 1000 + b"\n", "unknown column 'xxx"), (b"\x1b[2J,Mode\n", "unknown column '\\x1b[2J'"),
    (b"\0", "unknown column '\\x00'"),
], ids=range(8))
def test_a_file_that_is_none_is_one_short_line(tmp_path, data, words):
    (tmp_path / "profile.csv").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_layer_profile(tmp_path / "profile.csv", 2)
    message = str(caught.value)
    assert message.startswith(f"layer profile {tmp_path / 'profile.csv'}") and words in message and "\n" not in message
    assert len(message) < len(str(tmp_path)) + 300


def test_a_setting_of_json_is_checked_like_a_row():
    assert setting_of({"layer": "1", "mode": "lora", "rank": 4, "alpha": 8.0, "weight_lr_init": 0.5, "weight_lr_final": 0.25,
                       "reject_parts": ["ln1", "att.key"]}, 2, "here") == LayerSetting(
                           "1", "lora", 4, 8.0, weight_lr_init=0.5, weight_lr_final=0.25, reject_parts=("ln1", "att.key"))
    for change, said in (({"colour": 1}, "'colour'"), ({"layer": "2"}, "layer 2"), ({"rank": -1}, "Rank"),
                         ({"mode": "full"}, "Weight_lr_init")):
        with pytest.raises(UserError, match=said) as caught:
            setting_of({"layer": "0", "mode": "freeze"} | change, 2, "here")
        assert str(caught.value).startswith("here")


def test_a_setting_goes_through_json_and_back(tmp_path):
    path = tmp_path / "profile.csv"
    path.write_text(profile_text([*GOOD[:3], '"head",full,,,,1e-4,3.3e-5,0.1,,,"ln_out.weight, x"']))
    for setting in read_layer_profile(path, 2):
        assert setting_of(json.loads(json.dumps(asdict(setting))), 2, "here") == setting
