"""The programs of data_prep stand beside each other: what several of them need is a module of its
own."""

import ast

import pytest

from tests.paths import ROOT

SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "data_prep").glob("*.py"))}
COMMANDS = {name for name, source in SOURCES.items() if f'run("prep {name}")' in source}
FINISHED = {"check", "view"}  # commands on clips that are done, outside of `acetate prep`


def imported(source):
    """Modules that a source imports, those of data_prep as `data_prep.NAME`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_commands_are_found():
    names = [
        "cache_latents",
        "caption",
        "collect",
        "filter",
        "ingest",
        "inspect",
        "open_rgba",
        "render",
        "shard",
        "synthesize",
    ]
    assert sorted(COMMANDS) == names


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_imports_a_command(name):
    assert {f"data_prep.{command}" for command in COMMANDS | FINISHED}.isdisjoint(
        imported(SOURCES[name])
    )
