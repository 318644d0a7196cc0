"""Both stages of the tiny base learn on a GPU: the demo in small, 64 clips and 300 steps each."""

from pathlib import Path

import pytest

from tests.compose import called
from tests.test_resume import logged, run_of

pytestmark = pytest.mark.gpu
STEPS, EVERY = 300, 20
LEFT = 0.6  # at most, of the validation loss after EVERY steps; on a CPU a third


def learned(outputs: Path, experiment: str, device: str, *settings: str) -> list[float]:
    """Trains a stage, and returns its validation losses."""
    called(
        "train", f"experiment={experiment}", f"paths.outputs={outputs}", f"paths.cache={outputs}",
        f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={EVERY}",
        f"trainer.accelerator={device}", "trainer.num_sanity_val_steps=0",
        "trainer.enable_progress_bar=false", "callbacks.progress=null", "callbacks.curves=null",
        "data.num_workers=4", *settings,
    )  # fmt: skip
    return [float(row["val/loss"]) for row in logged(run_of(outputs)) if "val/loss" in row]


def check_learning(losses: list[float], experiment: str) -> None:
    print(f"{experiment}: {[round(loss, 4) for loss in losses]}")
    assert len(losses) == STEPS // EVERY
    left = losses[-1] / losses[0]
    assert left < LEFT, f"{left:.2f} of the validation loss is left"


def draw(folder: Path) -> Path:
    called("prep synthesize", f"out={folder}", "clips=64", "frames=9", "size=48")
    return folder


def vae_run(outputs: Path, shards: Path, device: str) -> list[float]:
    return learned(outputs, "vae_rgba", device, f"data.shards={shards}", "callbacks.panels=null")


def cache(folder: Path, shards: Path, run: Path, device: str) -> Path:
    called(
        "prep cache_latents", f"shards={shards}", f"out={folder}", f"rgba_vae={run}",
        "variants=2", "smallest=0.45", "background=key", f"device={device}",
    )  # fmt: skip
    return folder


def dit_run(outputs: Path, latents: Path, vae: Path, device: str) -> list[float]:
    return learned(
        outputs, "dit_dora", device, f"data.latents={latents}", f"rgba_vae={vae}",
        "callbacks.samples=null",
    )  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Shards, the run of the VAE stage on them, and its validation losses."""
    folder = tmp_path_factory.mktemp("learning")
    shards = draw(folder / "clips")
    losses = vae_run(folder / "vae", shards, "cuda")
    return shards, run_of(folder / "vae"), losses


def test_the_vae_stage_learns(vae):
    check_learning(vae[2], "vae_rgba")


def test_the_dit_stage_learns(vae, tmp_path):
    shards, run, _ = vae
    latents = cache(tmp_path / "latents", shards, run, "cuda")
    check_learning(dit_run(tmp_path / "dit", latents, run, "cuda"), "dit_dora")
