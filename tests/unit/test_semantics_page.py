"""docs/semantics.md shows the table that the live test holds to the truth."""

from pathlib import Path

from tests.kernel.kube_proxy_differences import markdown

PAGE = Path(__file__).parents[2] / "docs" / "semantics.md"


def test_the_page_shows_the_differences_as_they_are_tested() -> None:
    table = markdown()
    assert table in PAGE.read_text(), f"the table of docs/semantics.md must read:\n{table}"
