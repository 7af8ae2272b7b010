import pytest

from ssvq_jax.report.pages import insert, markdown_table


def test_text_goes_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    two = "<!-- two: begin -->\n<!-- two: end -->\n"
    page.write_text(f"a\n<!-- one: begin -->\nold\n<!-- one: end -->\n{two}")
    insert(page, "one", markdown_table(["x", "y"], [["1", r"\2"]]))
    assert page.read_text() == (
        "a\n<!-- one: begin -->\n| x | y |\n|---|---|\n| 1 | \\2 |\n<!-- one: end -->\n"
        "<!-- two: begin -->\n<!-- two: end -->\n"
    )
    insert(page, "two", "new")
    assert "<!-- two: begin -->\nnew\n<!-- two: end -->\n" in page.read_text()
    with pytest.raises(ValueError, match="has the markers 'three' 0 times, not once"):
        insert(page, "three", "")
