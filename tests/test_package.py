"""The wheel, in a new environment and another folder: the main job, a sample, clips."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from acetate.clips import Clip
from tests.paths import ROOT
from tests.processes import program

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("package")]
TINY = ["data.num_workers=0", "data.val_clips=2", "callbacks.panels.clips=1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run(
        [uv, "build", "--quiet", "--wheel", "--out-dir", out, ROOT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def acetate(wheel, tmp_path_factory):
    """Runs the installed command in a folder that holds nothing else, or (`forked`) the installed
    code in a process that has imported the packages it needs, those of this environment."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "env", with_pip=False)
    python = place / "env/bin/python"
    (site,) = place.glob("env/lib/python*/site-packages")
    (libraries,) = (path for path in map(Path, sys.path) if path.name == "site-packages")
    # not its own .pth files: acetate's clone stays out
    (site / "libraries.pth").write_text(str(libraries))
    uv = Path(sys.executable).with_name("uv")
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True
    )
    (place / "work").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        done = subprocess.run(
            [place / "env/bin/acetate", *arguments],
            cwd=place / "work",
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def forked(*arguments):
        log = place / "log"
        log.unlink(missing_ok=True)
        code, said = program(log, "acetate", *arguments, folder=place / "work", code=[site])
        assert code == 0, said[-5000:]

    run.forked, run.work = forked, place / "work"
    return run


def test_it_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "acetate/py.typed", "acetate/conf/config.yaml", "acetate/conf/experiment/vae_rgba.yaml",
        "acetate/assets/wan-tiny/vae/diffusion_pytorch_model.safetensors",
        "acetate/pages/report.html",
    ):  # fmt: skip
        assert name in names
    (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    asked = Parser().parsestr(zipfile.ZipFile(wheel).read(about).decode()).get_all("Requires-Dist")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sum("extra ==" not in one for one in asked) == len(wanted)


@pytest.mark.timeout(1200)
def test_the_main_job_in_another_folder(acetate):
    acetate("prep", "synthesize", "out=data/demo", "clips=12", "frames=9", "size=48")
    acetate.forked(
        "train",
        "experiment=vae_rgba",
        "name=demo",
        "trainer.max_steps=3",
        "trainer.val_check_interval=3",
        *TINY,
    )
    latents = ["shards=data/demo", "out=data/demo_latents", "rgba_vae=outputs/demo", "variants=1"]
    acetate.forked("prep", "cache_latents", *latents)
    acetate.forked(
        "train", "experiment=dit_dora", "name=demo_dit", "trainer.max_steps=3",
        "trainer.val_check_interval=3",
        "data.num_workers=0", "data.val_clips=2", "data.batch_size=2",
        "callbacks.samples.solver.steps=1",
    )  # fmt: skip
    acetate(
        "sample",
        "prompt=a ring of fire",
        "guide.centre=[0.5,0.5]",
        "steps=2",
        "out=clips",
        "formats=[webm]",
    )
    clip = Clip.read(next((acetate.work / "clips").glob("*.webm")))
    assert clip.rgb.shape == (3, 9, 48, 48)
    assert (acetate.work / "clips/sheet.png").exists()
    for settings in acetate.work.glob("outputs/*/*/config.yaml"):
        assert "commit: null" in settings.read_text()  # the installed code is of no repository
    assert sorted(path.name for path in acetate.work.iterdir()) == ["clips", "data", "outputs"]
