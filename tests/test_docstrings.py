"""Docstrings are sentences: they begin with the thing itself or with what it does."""

import ast
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

FRAGMENTS = {
    "Of", "What", "Whether", "How", "As", "That", "Those", "Where", "Which", "With", "Also", "On",
    "In", "At", "From", "Over", "Once",
}  # fmt: skip


def fragments(source: str) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions that begin as fragments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if text.partition(" ")[0] in FRAGMENTS:
                yield text.partition("\n")[0]


def test_docstrings_are_sentences():
    found = {}
    for file in sorted((ROOT / "src/acetate").rglob("*.py")):
        name = str(file.relative_to(ROOT))
        if bad := [*fragments(file.read_text())]:
            found[name] = bad
    assert not found


@pytest.mark.parametrize(
    ("text", "count"),
    [("Of a run.", 1), ("Whether it is due.", 1), ("Returns a run.", 0), ("A run of ours.", 0)],
)
def test_the_checker_tells_them_apart(text, count):
    source = f'class A:\n    def f(self):\n        """{text}"""\n'
    assert len([*fragments(source)]) == count
