"""A run that is killed and goes on is, bit for bit, the run that nobody killed: weights, optimizer, average, logs."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch.testing import assert_close

from tests.runs import ended, train, two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("runs")]

SMALL = {
    "vae_rgba": ["data.frames=5", "data.height=16", "data.width=16", "model.lora_rank=2", "callbacks=ema",
                 "callbacks.panels=null"],
    "dit_dora": ["task.rank=4", "task.alpha=4", "callbacks=dit_ema", "callbacks.samples=null"],
}  # fmt: skip


class SignalAt(Callback):
    """Of rank `rank` to itself, after so many batches of this process."""

    def __init__(self, batches: int, name: str, rank: int):
        self.batches, self.number, self.rank = batches, getattr(signal, name), rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches -= 1
        if not self.batches and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def signal_at(batches: int, name: str, rank: int) -> list[str]:
    settings = {"_target_": "tests.test_resume.SignalAt", "batches": batches, "name": name, "rank": rank}
    return [f"+callbacks.signal.{key}={value}" for key, value in settings.items()]


def small(experiment: str, outputs: Path, shards: Path, cached: tuple[Path, Path]) -> list[str]:
    """The recipe at the size of a test, everything logged at every step."""
    latents, adapters = cached
    data = (
        [f"data.shards={shards}"] if experiment == "vae_rgba" else [f"data.latents={latents}", f"rgba_vae={adapters}"]
    )
    return [
        f"experiment={experiment}", *data, *SMALL[experiment], "callbacks.progress=null",
        f"paths.outputs={outputs}", f"paths.cache={outputs}", "data.batch_size=2", "data.val_clips=2",
        "data.val_batch_size=1", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "trainer.enable_model_summary=false",
    ]  # fmt: skip


def run_of(outputs: Path) -> Path:
    (checkpoint,) = outputs.glob("*/*/checkpoints/last.ckpt")
    return checkpoint.parents[1]


def logged(run: Path) -> list[dict[str, str]]:
    """Every row of metrics.csv without what a clock says."""
    with (run / "metrics.csv").open() as file:
        rows = [
            {name: x for name, x in row.items() if x and not name.startswith("perf/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step"}]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, two))
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_close(second[part], first[part], rtol=0, atol=0)
    assert_close(second["callbacks"]["EMA"], first["callbacks"]["EMA"], rtol=0, atol=0)
    for module in ("ClipDataModule", "LatentDataModule"):
        assert second.get(module) == first.get(module)
    assert logged(two) == logged(one)


@pytest.mark.parametrize(
    ("experiment", "ranks", "workers", "accumulate"),
    [("vae_rgba", 1, 2, 3), ("vae_rgba", 2, 0, 1), ("dit_dora", 1, 0, 2), ("dit_dora", 2, 2, 2)],
)
def test_killed_run_goes_on_exactly(tmp_path, many_shards, cached, experiment, ranks, workers, accumulate):
    """Killed in the middle of a window of accumulation, where there is one; gone on, then asked to stop by one rank's
    SIGTERM just before a validation; gone on to the end."""

    def run(outputs: Path, *more: str) -> list[int | None]:
        arguments = [
            *small(experiment, outputs, many_shards, cached), f"data.num_workers={workers}", "trainer.max_steps=6",
            f"trainer.accumulate_grad_batches={accumulate}", "callbacks.checkpoint.every_n_train_steps=2",
            f"trainer.val_check_interval={2 * accumulate}", *more,
            *(["+trainer.limit_val_batches=0"] if (experiment, ranks) == ("dit_dora", 2) else []),
        ]  # fmt: skip
        log = tmp_path / f"{outputs.name}.log"
        return ended(*(two_ranks(log, *arguments) if ranks == 2 else [train(log, *arguments)]))

    # Of the cached windows only one is to validate on, too few for two ranks.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole) == [0] * ranks
    assert 0 not in run(parts, *signal_at(3 * accumulate + accumulate // 2, "SIGKILL", rank=ranks - 1))
    assert run(parts, "resume=last", *signal_at(accumulate + 1, "SIGTERM", rank=ranks - 1)) == [75, 0][:ranks]
    assert run(parts, "resume=last") == [0] * ranks
    assert_same_run(run_of(whole), run_of(parts))


class KilledInLastValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == trainer.max_steps:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_in_its_last_validation_ends_with_it(tmp_path, many_shards):
    """And measures the same once more if it is asked to go on from its end."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "data.num_workers=0",
        "trainer.max_steps=4", "trainer.val_check_interval=2",
    ]  # fmt: skip
    kill = "+callbacks.kill._target_=tests.test_resume.KilledInLastValidation"
    assert ended(train(tmp_path / "log", *arguments, kill)) == [-signal.SIGKILL]
    run = run_of(tmp_path)
    for _ in range(2):
        assert not (run / "finished").exists()
        assert ended(train(tmp_path / "log", *arguments, "resume=last")) == [0]
        assert [row["step"] for row in logged(run) if "val/loss" in row] == ["1", "3"]
        assert [row["step"] for row in logged(run) if "train/loss" in row] == ["0", "1", "2", "3"]
        (run / "finished").unlink()


def test_wandb_goes_on_under_one_id(tmp_path, many_shards):
    """Read from wandb's own offline files: two processes, one run in one folder."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "logger=wandb", "logger.offline=true",
        "data.num_workers=0", "trainer.val_check_interval=2", "task.decay_steps=4",
    ]  # fmt: skip
    for more in (["trainer.max_steps=2"], ["trainer.max_steps=4", "resume=last"]):
        codes = ended(train(tmp_path / "log", *arguments, *more, environment={"WANDB_SILENT": "true"}))
        assert codes == [0], (tmp_path / "log").read_text()[-2000:]
    run = run_of(tmp_path)
    identity = f"vae_rgba-{run.name}"
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert all(identity.encode() in file.read_bytes() and b"train/loss" in file.read_bytes() for file in files)
