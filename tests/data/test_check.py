"""`--check_data 1`: what it tells is what preparing would do, and nothing is written."""

import json
from pathlib import Path

import pytest

from src.data.check import check_pairs
from src.data.faults import Reading
from src.data.rows import Row
from src.data.templates import TEMPLATES
from src.data.tokenize import tokenize_pairs
from src.errors import UserError
from src.tokenizer import load_tokenizer
from tests.cli.conftest import snapshot
from tests.data.chat_templates import LLAMA_3
from tests.pairs_csv import write_pairs_csv

pytestmark = pytest.mark.usefixtures("storage")

ROWS = [Row("What?" * n, "yes" * (1 + n % 5), "no" * (1 + n % 7)) for n in range(1, 40)]
ROWS += [ROWS[3], Row(" " + ROWS[5].prompt, "another", "answer"), Row("Why?", "so\n\n.", " so\n."),
         Row("Human: a\n\nAssistant: b\n\nHuman: c", "d", "e")]
READING = Reading(Path("pairs.csv"), ROWS, list(range(1, len(ROWS) + 1)), [], [])


def test_cut_and_dropped_are_those_of_preparing():
    tokenizer = load_tokenizer("bytes")
    whole = [(len(p), len(c), len(r)) for p, c, r, *_ in tokenize_pairs(ROWS, tokenizer, None, 10**6, seed=3)[0]]
    for limit in [*range(14, 60), *(p + max(c, r) for p, c, r in whole)]:
        found = check_pairs(READING, tokenizer, limit, seed=3)
        pairs, report = tokenize_pairs(ROWS, tokenizer, None, limit, seed=3)
        assert (found["cut"], found["dropped"]) == (report.cut, report.dropped)
        assert found["rows"] == len(ROWS) == len(pairs) + report.dropped == sum(found["histogram"]["counts"])
        assert found["dropped_at"] == [n for n, (_, c, r) in enumerate(whole, start=1) if max(c, r) > limit][:20]
    assert found["tokens"]["pair"]["max"] == max(p + max(c, r) for p, c, r in whole)
    assert found["tokens"]["chosen"]["mean"] == pytest.approx(sum(c for _, c, _ in whole) / len(whole))


@pytest.mark.parametrize("letters", [[7] * 3, [7, 8, 9], [1, 12], [1, 13], range(5, 400)])
def test_bins_hold_equally_many_lengths_and_every_pair_is_in_its_own(letters):
    rows = [Row("a" * count, "b", "c") for count in letters]
    tokenizer = load_tokenizer("bytes")
    found = check_pairs(Reading(Path("pairs.csv"), rows, list(range(1, len(rows) + 1)), [], []), tokenizer, 1000, seed=0)
    lengths = [len(p) + max(len(c), len(r)) for p, c, r, *_ in tokenize_pairs(rows, tokenizer, None, 1000, seed=0)[0]]
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    widths = {high - low for low, high in zip(edges, edges[1:], strict=False)}
    assert len(widths) == 1 and all(isinstance(edge, int) for edge in edges) and len(counts) <= 12
    assert counts == [sum(low <= length < high for length in lengths) for low, high in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == len(rows) and counts[0] and counts[-1]


def test_repeats_equal_answers_and_conversations_are_named_by_row():
    found = check_pairs(READING, load_tokenizer("bytes"), 1000, seed=0)
    assert (found["duplicate_rows_at"], found["duplicate_prompts_at"], found["equal_answers_at"]) == ([40], [40, 41], [42])
    assert (found["conversations"], found["most_turns"]) == (1, 4)
    assert found["begins"].startswith("User: What?\n\nAssistant: yesyes")


def test_pairs_of_a_list_are_of_one_row_and_repeat_no_prompt():
    rows = [Row("Human: a\n\nAssistant: b\n\nHuman: c", answer, "z") for answer in ("x", "y", "z")] + [Row("d", "x", "y")] * 2
    reading = Reading(Path("lists.jsonl"), rows, [2, 2, 2, 3, 5], [], [])
    assert reading.row_count() == 3
    found = check_pairs(reading, load_tokenizer("bytes"), 20, seed=0)
    assert (found["rows"], found["pairs"], found["conversations"]) == (3, 5, 1)
    assert (found["duplicate_prompts"], found["duplicate_prompts_at"], found["duplicate_rows_at"]) == (1, [5], [5])
    assert (found["equal_answers_at"], found["cut"], found["cut_at"]) == ([2], 5, [2, 3, 5])


@pytest.mark.parametrize("special", [{}, {"bos_token": "<s>"}])
def test_the_beginning_is_shown_with_its_control_tokens_as_the_tokens_are(template, special):
    tokenizer = load_tokenizer("bytes")
    made = template(LLAMA_3.replace("'<|eot_id|>'", "eos_token"), tokenizer, **special)
    for of, begins in ((TEMPLATES["g1"], "<|endoftext|>User: Why?\n\nAssistant: So.<|endoftext|>"),
                       (made, "<|endoftext|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|endoftext|>"
                              "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|endoftext|>")):
        found = check_pairs(Reading(Path("pairs.csv"), [Row("Why?", "So.", "No.")], [1], [], []), tokenizer, 1000, 0, of)
        assert found["begins"] == begins == "".join([*found["shown"]["prompt"], *found["shown"]["chosen"]])


def test_answers_with_turns_of_a_chat_template_are_counted(template):
    answers = ["a", "a<|start_header_id|>user<|end_header_id|>\n\nhi", "b", "So <|eot_id|> x"]
    reading = Reading(Path("pairs.csv"), [Row("Why?", answer, "No.") for answer in answers], [1, 2, 3, 4], [], [])
    found = check_pairs(reading, load_tokenizer("bytes"), 1000, 0, template(LLAMA_3))
    assert (found["turn_names"], found["turn_names_at"]) == (2, [2, 4])


def test_the_script_prints_a_table_and_json_and_writes_nothing(tmp_path, capsys, monkeypatch):
    import rlhf_dpo_generate_save as script

    write_pairs_csv(tmp_path / "pairs.csv", ROWS)
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    script.main(["--input_csv", "pairs.csv", "--check_data", "1", "--tokenizer", "bytes", "--rlhf_max_corpus_len", "60"])
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["rows"] == len(ROWS) and told["max_len"] == 60
    assert "prompt + longer answer" in err and "longer than 60 tokens" in err and "█" in err
    assert snapshot(tmp_path) == before


def test_without_a_model_it_needs_a_tokenizer_and_without_check_data_an_output():
    import rlhf_dpo_generate_save as script

    for flags, word in ((["--check_data", "1"], "--load_model"), ([], "--load_model"),
                        (["--load_model", "x.pth"], "--output_save")):
        with pytest.raises(UserError, match=word):
            script.main(["--input_csv", "pairs.csv", *flags])
