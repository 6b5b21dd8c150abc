"""The preprocessing job as a whole: it goes on where it was broken off, to the very same file."""

import json
import zlib
from dataclasses import replace

import pytest
import torch

import src.preference.prepare as preparing
import src.preference.reference as reference
from src.checkpoint.io import load_checkpoint, save_safetensors
from src.errors import NotFinite, UserError
from src.preference.config import PrepareConfig
from src.preference.prepare import prepare
from src.quantization.strategy import Strategy


@pytest.fixture
def config(material, tmp_path) -> PrepareConfig:
    return PrepareConfig(
        load_model=str(material / "x070.pth"), input_csv=str(material / "pairs.csv"), output_save=str(tmp_path / "made.save"),
        target_pair_count=30, rlhf_max_corpus_len=512, batch_tokens=200, strategy=Strategy(torch.device("cpu"), "fp32", None))


class Plug(Exception):
    pass


def broken_off(config: PrepareConfig, after: int, monkeypatch) -> None:
    calls = 0
    answer_log_probs = reference.answer_log_probs

    def breaks(*arguments):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Plug
        return answer_log_probs(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "answer_log_probs", breaks)
        with pytest.raises(Plug):
            prepare(config)


@pytest.mark.parametrize("unpair", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bytes(config, tmp_path, monkeypatch, capsys, unpair):
    config = replace(config, unpair=unpair)
    unbroken = replace(config, output_save=str(tmp_path / "unbroken.save"))
    prepare(unbroken)
    broken_off(config, 3, monkeypatch)
    partial = tmp_path / "made.save.partial"
    assert partial.exists() and not (tmp_path / "made.save").exists()
    with partial.open("ab") as file:
        file.write(b"[3, [[-1.")  # torn off in the middle of a line
    broken_off(config, 2, monkeypatch)
    passes = []
    answer_log_probs = reference.answer_log_probs
    monkeypatch.setattr(reference, "answer_log_probs", lambda *given: passes.append(1) or answer_log_probs(*given))
    capsys.readouterr()
    prepare(config)
    assert "resuming after 5 finished batches" in capsys.readouterr().err
    assert passes  # there was something left to do
    assert (tmp_path / "made.save").read_bytes() == (tmp_path / "unbroken.save").read_bytes()
    assert (tmp_path / "made.save.json").read_bytes() == (tmp_path / "unbroken.save.json").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("changes", [{"batch_tokens": 100}, {"seed": 1}, {"unpair": True},
                                     {"strategy": Strategy(torch.device("cpu"), "bf16", None)}])
def test_an_interrupted_run_of_another_kind_is_not_gone_on_with(config, monkeypatch, changes):
    broken_off(config, 2, monkeypatch)
    with pytest.raises(UserError, match=r"made.save.partial: was left by an interrupted run with another"):
        prepare(replace(config, **changes))
    prepare(config)


@pytest.mark.parametrize("content", [b"not of ours\n", b"not of ours", b'"abc"\n', b"\xff\xfe", b"[1]\n"])
def test_a_partial_file_of_something_else_is_left_alone(config, tmp_path, content):
    (tmp_path / "made.save.partial").write_bytes(content)
    with pytest.raises(UserError, match="is damaged, or no file of this script's; remove it"):
        prepare(config)
    assert (tmp_path / "made.save.partial").read_bytes() == content


@pytest.mark.parametrize(("line", "words"), [
    (lambda number, values: [number, [[-1.0]] * len(values)], "can't be log-probabilities of answers"),
    (lambda number, values: [number, [["-1.0", -1.0]] * len(values)], "is text where a number"),
    (lambda number, values: [number, [[0.5, -1.0]] * len(values)], "can't be log-probabilities of answers"),
    (lambda number, values: [number, [[-1.0, -1e30]] * len(values)], "can't be log-probabilities of answers"),
    (lambda number, values: [number, [[float("nan"), -1.0]] * len(values)], "NaN"),
    (lambda number, values: [number, [[True, -1.0]] * len(values)], "is true or false"),
    (lambda number, values: [number, values[:-1]], "batch 0 has"),
    (lambda number, values: [number, []], "batch 0 has 0 pairs"),
    (lambda number, values: [-1, values], "not a batch's number"),
    (lambda number, values: [1, values], "there twice"),
    (lambda number, values: [10 ** 6, values], "batch 1000000 has"),
    (lambda number, values: [0.0, values], "a number where"),
    (lambda number, values: ["0", values], "text where"),
    (lambda number, values: [values, number], "not a batch's number"),
    (lambda number, values: [number, values, 3], "not a batch's number"),
    (lambda number, values: {"0": values}, "is an object"),
    (lambda number, values: number, "is a whole number"),
])
def test_a_line_that_is_no_batch_s_results_never_reaches_the_output(config, tmp_path, monkeypatch, line, words):
    broken_off(config, 2, monkeypatch)
    partial = tmp_path / "made.save.partial"
    header, first, second = partial.read_text().splitlines()
    partial.write_text("\n".join([header, with_checksum(line(*json.loads(first[:-9]))), second, ""]))
    before = partial.read_bytes()
    with pytest.raises(UserError, match=words) as caught:
        prepare(config)
    assert str(caught.value).startswith(f"{partial}: is damaged (") and "\n" not in str(caught.value)
    assert partial.read_bytes() == before and not (tmp_path / "made.save").exists()


@pytest.mark.parametrize("change", [lambda line: line.replace("[0,", "[1,", 1), lambda line: line[:-1], lambda line: line[:-9],
                                    lambda line: line[:-12] + ("1" if line[-12] != "1" else "2") + line[-11:], lambda line: ""])
def test_a_line_that_was_changed_is_seen(config, tmp_path, monkeypatch, change):
    """A digit that became another one is a log-probability like any other."""
    broken_off(config, 1, monkeypatch)
    partial = tmp_path / "made.save.partial"
    header, first = partial.read_text().splitlines()
    assert first == with_checksum(json.loads(first[:-9]))
    partial.write_text(f"{header}\n{change(first)}\n")
    with pytest.raises(UserError, match=r"line 2 has a wrong checksum\); remove it"):
        prepare(config)


def with_checksum(entry: object) -> str:
    text = json.dumps(entry)
    return f"{text} {zlib.crc32(text.encode()):08x}"


def test_nothing_finished_blocks_nothing(config, tmp_path, monkeypatch):
    """A partial file stays where it holds work that another run can use, and nowhere else."""
    partial = tmp_path / "made.save.partial"
    broken_off(config, 0, monkeypatch)
    assert not partial.exists()
    partial.write_text(json.dumps("0" * 64) + "\n")  # of a run that was killed before its first batch
    broken_off(replace(config, seed=1), 1, monkeypatch)
    assert partial.exists()
    with pytest.raises(UserError, match="left by an interrupted run with another"):
        prepare(config)
    partial.unlink()
    for content in (b'"', b'"012', json.dumps("0" * 64).encode()):  # killed while it wrote the first line
        partial.write_bytes(content)
        prepare(config)
        assert not partial.exists()


@pytest.mark.parametrize("value", [float("nan"), -1e30, 5.0])
def test_a_run_whose_numbers_no_model_has_leaves_no_partial_file(config, tmp_path, monkeypatch, value):
    calls = 0
    answer_log_probs = reference.answer_log_probs

    def wrong_at_last(model, batch):
        nonlocal calls
        calls += 1
        found = answer_log_probs(model, batch)
        return found if calls < 3 else found._replace(answer=found.answer.index_fill(0, torch.tensor([0]), value))

    with monkeypatch.context() as patch:
        patch.setattr(reference, "answer_log_probs", wrong_at_last)
        with pytest.raises(NotFinite, match="x070.pth gives"):
            prepare(config)
    assert calls == 3 and not list(tmp_path.iterdir())
    prepare(config)


@pytest.mark.parametrize("references", [True, False])
def test_the_second_of_two_runs_is_refused_before_it_reads_anything(config, tmp_path, monkeypatch, references):
    run = replace(config, reference=references)
    read_pairs = preparing.read_pairs

    def reads(*arguments, **options):
        with pytest.raises(UserError, match=r"made.save.partial: another run is writing it"):
            prepare(run)
        return read_pairs(*arguments, **options)

    monkeypatch.setattr(preparing, "read_pairs", reads)
    prepare(run)
    assert (tmp_path / "made.save").exists() and not (tmp_path / "made.save.partial").exists()


@pytest.mark.parametrize("references", [True, False])
def test_a_run_that_fails_at_once_leaves_no_partial_file(config, tmp_path, references):
    with pytest.raises(UserError):
        prepare(replace(config, input_csv=str(tmp_path / "missing.csv"), reference=references))
    assert not list(tmp_path.iterdir())


def test_a_check_takes_no_more_of_a_model_than_its_shapes(config, material, tmp_path, capsys):
    weights = load_checkpoint(config.load_model)
    path = tmp_path / "model.safetensors"
    save_safetensors(weights | {"head.weight": torch.full_like(weights["head.weight"], torch.nan)}, path, {})
    prepare(replace(config, load_model=str(path), check_data=True))


def test_without_references_a_partial_file_is_kept_or_goes_as_with_them(config, tmp_path, monkeypatch):
    partial, without = tmp_path / "made.save.partial", replace(config, reference=False)
    broken_off(config, 2, monkeypatch)
    before = partial.read_bytes()
    with pytest.raises(UserError, match=r"made.save.partial: was left by an interrupted run with another"):
        prepare(without)
    assert partial.read_bytes() == before and not (tmp_path / "made.save").exists()
    partial.write_bytes(before[:before.index(b"\n") + 1])  # in which nothing is finished
    prepare(without)
    assert (tmp_path / "made.save").exists() and not partial.exists()
