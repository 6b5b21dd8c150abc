"""What reaches a terminal: no control character of a file's own, and tables that can be read."""

import pytest
from rich.table import Table

from src.console import printable, say, show


@pytest.mark.parametrize(("text", "shown"), [
    ("plain, größer, 漢字, 🙂", "plain, größer, 漢字, 🙂"),
    ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"), ("a\x7fb\x9bc", r"a\x7fb\x9bc"),
    ("exe\u202etxt", r"exe\u202etxt"), ("two\nlines\tand a tab", "two lines and a tab"), ("\udcff\udcfe", r"\xff\xfe"),
    ("\ud800", r"\ud800"), ("\0", r"\x00"), ("[bold]x[/y]", "[bold]x[/y]"),
])
def test_what_is_written_out(text, shown, capsys):
    assert printable(text) == shown
    say(text)
    assert capsys.readouterr().err == shown + "\n"


@pytest.mark.parametrize("columns", ["20", "1", "200"])
def test_a_table_is_readable_in_any_window(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    table = Table("[red]measure", "400 pairs :smile:")
    table.add_row("the model itself finds the chosen answer likelier", "[/y]")
    show(table)
    out = capsys.readouterr().out
    assert "the model itself finds the chosen answer likelier" in out and "[red]measure" in out and "[/y]" in out
    assert ":smile:" in out and "\x1b" not in out
