"""Docstrings are sentences: a function's begins with what it does, others with the thing itself."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

FRAGMENTS = {
    "Of", "What", "Whether", "How", "As", "That", "Those", "Where", "Which", "With", "Also", "On",
    "In", "At", "From", "Over", "Once",
}  # fmt: skip
NO_VERBS = {"As", "This", "Its", "Others", "Is", "Class", "Names", "Lines", "Sides", "Numbers"}
VERB = re.compile("[A-Z][a-z]+s")  # Returns, Reads, Raises
Function = ast.FunctionDef | ast.AsyncFunctionDef


def fragments(source: str) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions that begin as fragments."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | Function):
            continue
        text = ast.get_docstring(node) or "Is fine."
        word = text.split()[0].rstrip(",:")
        if isinstance(node, Function) and not is_property(node) and text != "Is fine.":
            good = VERB.fullmatch(word) and word not in NO_VERBS
        else:
            good = word not in FRAGMENTS
        if not good:
            yield text.partition("\n")[0]


def is_property(node: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("folder", ["src/acetate", "data_prep"])
def test_docstrings_are_sentences(folder):
    found = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        if bad := [*fragments(file.read_text())]:
            found[str(file.relative_to(ROOT))] = bad
    assert not found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Of a run.", 1), ("Whether it is due.", 1), ("The clip's key.", 1), ("(H, W, 4).", 1),
        ("Key -> line.", 1), ("ValueError where it fails.", 1), ("Returns a run.", 0),
        ("Reads a run of ours.", 0),
    ],
)  # fmt: skip
def test_the_checker_tells_them_apart(text, count):
    source = f'class A:\n    def f(self):\n        """{text}"""\n'
    assert len([*fragments(source)]) == count


def test_classes_and_properties_are_called_what_they_are():
    source = 'class A:\n    """A run."""\n    @property\n    def f(self):\n        """The key."""\n'
    assert not [*fragments(source)]
    assert len([*fragments(source.replace("A run", "What runs").replace("The key", "Of f"))]) == 2
