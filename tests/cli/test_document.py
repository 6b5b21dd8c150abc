"""docs/flags.md says of every flag what the parsers say."""

from src.cli.document import PAGE, page


def test_the_page_is_that_of_these_flags():
    assert PAGE.read_text(encoding="utf-8") == page(), "run make docs"
