"""Which way imports run: an arrow against the plan fails here, with its line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

LAYERS = (
    {
        "alpha",
        "regions",
        "released",
        "flow",
        "lightning_seams",
        "vgg",
        "cuda_autocast",
        "draws",
        "media",
        "video_io",
        "video_out",
        "replacing",
        "steps",
        "redaction",
        "torchrun",
        "console",
        "documents",
        "clips",
        "pages",
        "settings",
    },
    {"models", "losses", "metrics", "data"},
    {"tasks", "sampling", "formats", "guides", "blank", "memory", "cost"},
    {"callbacks"},
    {"acetate", "cli", "commands", "pipeline", "assembly", "data_prep", "train", "__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
SIBLINGS_APART = LAYERS[1]  # may import the first layer and themselves, never each other
# read batches and outputs and know no task; beside the first layer they may sample
CALLBACKS = LAYERS[3]
PROGRAMS = LAYERS[4]  # the only ones that see a DictConfig
CONFIG_PACKAGES = {"omegaconf", "hydra"}


def room_of(module: str) -> str:
    """`acetate.models.wan` -> `models`, `data_prep.shard` -> `data_prep`; other packages as they
    are."""
    parts = module.split(".")
    if module.startswith(("acetate.released.vae", "acetate.released.dit")):
        return "tasks"  # subclasses of what stands there
    return parts[1] if parts[0] == "acetate" and len(parts) > 1 else parts[0]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, however deep in the code it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "acetate":
                for alias in node.names:
                    yield node.lineno, f"acetate.{alias.name}"
            else:
                yield node.lineno, module


def against_the_plan(here: str, there: str) -> str | None:
    """Why a module of room `here` must not import from `there`; None where it may."""
    if there in CONFIG_PACKAGES:
        return None if here in PROGRAMS else "only programs see a DictConfig"
    if there == "acetate" or there not in RANK or here == there:
        return None
    if RANK[there] > RANK[here]:
        return f"{there} stands above {here}"
    if here in SIBLINGS_APART and there in SIBLINGS_APART:
        return f"{here} and {there} are siblings"
    if here in CALLBACKS and RANK[there] > 0 and there != "sampling":
        return f"{here} import the first layer and sampling only"
    return None


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Lines of `source`, the code of `module`, whose imports run against the plan."""
    package = module if is_package else module.rpartition(".")[0]
    here = room_of(module)
    found = []
    for line, name in imported(ast.parse(source), package):
        reason = against_the_plan(here, room_of(name))
        if reason:
            found.append(f"{module}:{line} imports {name}: {reason}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for root, folder in ((ROOT / "src", "acetate"), (ROOT, "data_prep")):
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file
    yield "train", ROOT / "train.py"


@pytest.mark.parametrize(("module", "file"), [pytest.param(m, f, id=m) for m, f in modules()])
def test_imports_run_downwards(module, file):
    assert violations(module, file.read_text(), file.name == "__init__.py") == []


def test_every_room_is_in_the_plan():
    rooms = {room_of(module) for module, _ in modules()} - {"acetate"}
    assert rooms <= RANK.keys()
    assert {
        "alpha",
        "models",
        "losses",
        "data",
        "tasks",
        "callbacks",
        "commands",
        "data_prep",
        "train",
    } <= rooms


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("acetate.alpha", "from acetate.models.wan import Geometry"),
        ("acetate.models.wan", "import acetate.tasks.vae"),
        ("acetate.models.wan", "from acetate.losses import terms"),
        ("acetate.models.wan", "from acetate import losses"),
        ("acetate.models.wan", "from ..data import shards"),
        ("acetate.data.clips", "def f():\n    from acetate.metrics.rgb import frames"),
        ("acetate.tasks.vae", "from acetate.callbacks.panels import Panels"),
        ("acetate.callbacks.panels", "from acetate.tasks.vae import RGBAVAETask"),
        ("acetate.callbacks.panels", "from acetate.metrics.rgb import frames"),
        ("acetate.formats.names", "import data_prep.shard"),
        ("acetate.models.loading", "from acetate.blank import BLANK"),
        ("acetate.memory", "from acetate.callbacks.ema import EMA"),
        ("acetate.tasks.vae", "from omegaconf import DictConfig"),
        ("acetate.models.loading", "import hydra.utils"),
    ],
)
def test_the_checker_sees(module, line):
    source = f'"""A made-up module."""\n\n{line}\n'
    (found,) = violations(module, source)
    assert found.startswith(f"{module}:{3 + line.count(chr(10))} imports ")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("acetate.models.rgba_vae", "from acetate.models.wan import Geometry"),
        ("acetate.models.rgba_vae", "from .wan import Geometry"),
        ("acetate.losses.diffusion", "from acetate import flow, regions"),
        ("acetate.tasks.vae", "from acetate.data import synthetic"),
        ("acetate.callbacks.panels", "from acetate.video_io import write_video"),
        ("acetate.commands.evaluate", "from acetate.tasks.vae import RGBAVAETask"),
        ("acetate.memory", "from acetate.tasks.vae import RGBAVAETask"),
        ("acetate.commands.evaluate", "from omegaconf import DictConfig"),
        ("data_prep.shard", "from acetate.data.shards import ShardWriter"),
        ("train", "import hydra"),
        ("acetate.alpha", "import torch"),
    ],
)
def test_the_checker_allows(module, line):
    assert violations(module, line) == []
