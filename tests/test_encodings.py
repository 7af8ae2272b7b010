"""Every text file is read and written in UTF-8, whatever the locale."""

import ast
from pathlib import Path

import ssvq_jax

ROOT = Path(ssvq_jax.__file__).parents[1]
MODES = {"r", "w", "a", "x", "r+", "w+"}


def nameless(tree: ast.AST) -> list[int]:
    """Lines with calls that leave the encoding to the locale."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        modes = [x.value for x in node.args if isinstance(x, ast.Constant)]
        reads = node.func.attr in ("read_text", "write_text")
        opens = node.func.attr == "open" and modes[:1] and modes[0] in MODES
        if reads or opens:
            found.append(node.lineno)
    return found


def test_every_text_file_names_its_encoding():
    files = [
        x for room in ("ssvq_jax", "experiments", "benchmarks") for x in (ROOT / room).rglob("*.py")
    ]
    assert len(files) > 50
    lines = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := nameless(ast.parse(file.read_text(encoding="utf-8"))))
    }
    # An array file in a zip archive, and a function of our own that is called like Path's.
    allowed = {"ssvq_jax/cli/export.py"}
    assert {file for file in lines if file not in allowed} == set(), lines


def test_the_check_finds_them():
    assert nameless(ast.parse("Path('x').read_text()\nfile.open('w')\nfile.open('rb')")) == [1, 2]
