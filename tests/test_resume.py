"""A run that is killed and goes on is, bit for bit, the run that nobody killed: weights, optimizer,
average, logs."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from lightning import Callback
from torch.testing import assert_close

from acetate.formats.training import WholeCheckpointIO
from acetate.models.adapters import read_adapter_file
from tests.processes import ended, train, train_ranks

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("runs")]

SMALL = {
    "vae_rgba": ["data.frames=5", "data.height=16", "data.width=16", "model.lora_rank=2",
    "callbacks=ema",
                 "callbacks.panels=null"],
    "dit_dora": ["task.rank=4", "task.alpha=4", "callbacks=ema", "callbacks.samples=null"],
}  # fmt: skip


class SignalAt(Callback):
    """Of rank `rank` to itself, after so many batches of this process; SIGTERM to its data workers,
    too, and from another process, as a scheduler's."""

    def __init__(self, batches: int, name: str, rank: int):
        self.batches, self.name, self.rank = batches, name, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches -= 1
        if not self.batches and trainer.global_rank == self.rank:
            workers = psutil.Process().children() if self.name == "SIGTERM" else []
            subprocess.run(
                ["kill", "-s", self.name[3:], *(str(w.pid) for w in workers), str(os.getpid())],
                check=True,
            )


class KilledAt(Callback):
    """Rank `rank` is killed when it is about to rename or open (of sys.addaudithook) a path that
    ends so, but for the first `spared` times."""

    def __init__(self, event: str, path: str, rank: int, spared: int):
        self.event, self.path, self.rank, self.spared = event, path, rank, spared

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == self.rank:
            sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if event == self.event and str(arguments[0]).endswith(self.path):
            self.spared -= 1
            if self.spared < 0:
                os.kill(os.getpid(), signal.SIGKILL)


class OwnDisk(WholeCheckpointIO):
    """On which rank 1 finds the checkpoint of a step before."""

    def load_checkpoint(self, path, *args, **settings):
        return super().load_checkpoint(
            path.replace("last", "00000003") if os.environ["RANK"] == "1" else path
        )


def added(callback: type[Callback], **settings) -> list[str]:
    """To the callbacks of a run."""
    place = {"_target_": f"tests.test_resume.{callback.__name__}", **settings}
    return [f"+callbacks.{callback.__name__}.{key}={value}" for key, value in place.items()]


def small(experiment: str, outputs: Path, shards: Path, cached: tuple[Path, Path]) -> list[str]:
    """The recipe at the size of a test, everything logged at every step."""
    latents, adapters = cached
    data = (
        [f"data.shards={shards}"]
        if experiment == "vae_rgba"
        else [f"data.latents={latents}", f"rgba_vae={adapters}"]
    )
    return [
        f"experiment={experiment}", *data, *SMALL[experiment], "callbacks.progress=null",
        f"wan.transformer={shards.parent / 'base'}", "callbacks.curves=null",
        f"paths.outputs={outputs}", f"paths.cache={outputs}", "data.batch_size=2",
        "data.val_clips=2",
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
            {name: x for name, x in row.items() if x and not name.startswith("perf/")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step"}]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = (
        WholeCheckpointIO().load_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
        for run in (one, two)
    )
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_close(second[part], first[part], rtol=0, atol=0)
    assert_close(second["callbacks"]["EMA"], first["callbacks"]["EMA"], rtol=0, atol=0)
    for module in ("ClipDataModule", "LatentDataModule"):
        assert second.get(module) == first.get(module)
    assert logged(two) == logged(one)
    adapters, expected = (
        read_adapter_file(run / "checkpoints/last.safetensors") for run in (two, one)
    )
    assert_close(adapters[0], expected[0], rtol=0, atol=0)
    assert adapters[1] == expected[1]


@pytest.mark.parametrize(
    ("experiment", "trainer", "ranks", "workers", "accumulate"),
    [
        ("vae_rgba", "default", 1, 2, 3), ("vae_rgba", "ddp", 2, 0, 1),
        ("vae_rgba", "fsdp", 2, 2, 1),
        ("dit_dora", "default", 1, 0, 2), ("dit_dora", "ddp", 2, 2, 2),
        ("dit_dora", "fsdp", 2, 0, 2),
    ],
)  # fmt: skip
def test_killed_run_goes_on_exactly(
    tmp_path, many_shards, cached, experiment, trainer, ranks, workers, accumulate
):
    """Killed in the middle of a window of accumulation, where there is one; gone on, then asked to
    stop by one rank's SIGTERM, which its data workers get as well, just before a validation; gone
    on to the end."""

    def run(outputs: Path, *more: str) -> list[int | None]:
        arguments = [
            *small(experiment, outputs, many_shards, cached), f"data.num_workers={workers}",
            "trainer.max_steps=6",
            f"trainer.accumulate_grad_batches={accumulate}",
            "callbacks.checkpoint.every_n_train_steps=2",
            "trainer.val_check_interval=2", f"trainer={trainer}", *more,
            *(["+trainer.limit_val_batches=0"] if (experiment, ranks) == ("dit_dora", 2) else []),
        ]  # fmt: skip
        return ended(*train_ranks(ranks, tmp_path / f"{outputs.name}.log", *arguments))

    # Of the cached windows only one is to validate on, too few for two ranks.
    killed = added(
        SignalAt, batches=3 * accumulate + accumulate // 2, name="SIGKILL", rank=ranks - 1
    )
    stopped = added(SignalAt, batches=accumulate + 1, name="SIGTERM", rank=ranks - 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole) == [0] * ranks
    assert 0 not in run(parts, *killed)
    assert run(parts, "resume=last", *stopped) == [75, 0][:ranks]
    assert run(parts, "resume=last") == [0] * ranks
    assert_same_run(run_of(whole), run_of(parts))


def test_panels_of_step_0_change_nothing_else(tmp_path, many_shards):
    """Neither a bit of what is trained nor a row of what is logged; a run that goes on draws
    none."""
    runs = []
    for sanity in (0, 1):
        outputs = tmp_path / str(sanity)
        arguments = [
            *small("vae_rgba", outputs, many_shards, (many_shards, many_shards)),
            "data.num_workers=0",
            "trainer.max_steps=2", "trainer.val_check_interval=2", "loss.diffusion.mode=off",
            "callbacks=ema",
            f"trainer.num_sanity_val_steps={sanity}",
        ]  # fmt: skip
        drawn = [text for text in arguments if text != "callbacks.panels=null"] + [
            "callbacks.panels.clips=1"
        ]
        assert ended(train(tmp_path / f"{sanity}.log", *drawn)) == [0]
        runs.append(run_of(outputs))
        steps = sorted(folder.name for folder in (runs[-1] / "panels").iterdir())
        assert steps == ["step_00000000", "step_00000002"][1 - sanity :]
    assert_same_run(*runs)


class KilledInLastValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == trainer.max_steps:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_at_its_end_ends_with_all_that_is_due(tmp_path, many_shards):
    """Amid its last checkpoint, then in its last validation; it measures the same once more if it
    is asked to go on from its end."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "data.num_workers=0",
        "trainer.max_steps=4", "trainer.val_check_interval=2",
    ]  # fmt: skip
    saving = added(KilledAt, event="os.rename", path="/.last.safetensors.tmp", rank=0, spared=1)
    assert ended(train(tmp_path / "log", *arguments, *saving)) == [-signal.SIGKILL]
    validating = "+callbacks.kill._target_=tests.test_resume.KilledInLastValidation"
    assert ended(train(tmp_path / "log", *arguments, "resume=last", validating)) == [
        -signal.SIGKILL
    ]
    run = run_of(tmp_path)
    for _ in range(2):
        assert not (run / "finished").exists()
        assert ended(train(tmp_path / "log", *arguments, "resume=last")) == [0]
        assert [row["step"] for row in logged(run) if "val/loss" in row] == ["2", "4"]
        assert [row["step"] for row in logged(run) if "train/loss" in row] == ["1", "2", "3", "4"]
        assert read_adapter_file(run / "checkpoints/last.safetensors")[1]["step"] == 4
        (run / "finished").unlink()


def test_a_sharded_run_that_is_killed_amid_its_checkpoints(tmp_path, many_shards):
    """As rank 1 writes its shards, and as rank 0 puts a new last.ckpt in the place of the old one.
    In the end, ranks that see different checkpoints are told so."""

    def run(outputs: Path, *more: str, of_each: Sequence[str] = ()) -> list[int | None]:
        arguments = [
            *small("vae_rgba", outputs, many_shards, (many_shards, many_shards)), "trainer=fsdp",
            "data.num_workers=0",
            "trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=1",
            "+trainer.limit_val_batches=0",
            "callbacks.checkpoint.save_top_k=-1", *more,
        ]  # fmt: skip
        return ended(
            *train_ranks(2, tmp_path / f"{outputs.name}.log", *arguments, of_each=of_each),
            within=100,
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole) == [0, 0]
    writing = added(KilledAt, event="open", path=".last.ckpt.tmp/__1_0.distcp", rank=1, spared=1)
    assert 0 not in run(parts, *writing)
    checkpoints = run_of(parts) / "checkpoints"
    assert not (checkpoints / ".last.ckpt.tmp/.metadata").exists()
    renaming = added(KilledAt, event="os.rename", path=".last.ckpt.tmp", rank=0, spared=1)
    assert 0 not in run(parts, "resume=last", *renaming)
    assert (checkpoints / ".old-last.ckpt").is_dir() and not (checkpoints / "last.ckpt").exists()
    assert run(parts, "resume=last") == [0, 0]
    assert_same_run(run_of(whole), run_of(parts))
    own = run_of(whole) / "checkpoints/last.ckpt"
    apart = ["trainer.max_steps=5", f"resume={own}"]
    assert run(tmp_path / "none", *apart, of_each=["seed=0", "resume=null"]) == [1, 1]
    plugin = "trainer.plugins.0._target_=tests.test_resume.OwnDisk"
    assert run(tmp_path / "other", *apart, "trainer=ddp", plugin) == [1, 1]
    for name, said in (
        ("none", f"rank 0 goes on from checkpoint {own}, rank 1 from checkpoint None"),
        ("other", "rank 0 goes on from step 4, rank 1 from step 3"),
    ):
        assert all(said in (tmp_path / f"{name}.log_{rank}").read_text() for rank in range(2))


def test_one_process_at_a_time_writes_a_run(tmp_path, many_shards):
    """The second is refused; when the first is killed, its data workers, who live on for seconds,
    hold up nobody."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)),
        "loss.diffusion.mode=off",
        "callbacks.checkpoint.every_n_train_steps=1", "+trainer.limit_val_batches=0",
        "data.num_workers=1",
    ]  # fmt: skip
    first = train(tmp_path / "first.log", *arguments, "trainer.max_steps=100000")
    while not list(tmp_path.glob("*/*/checkpoints/last.ckpt")):
        first.join(0.1)
        assert first.is_alive(), (tmp_path / "first.log").read_text()[-2000:]
    assert ended(
        train(tmp_path / "second.log", *arguments, "resume=last", "trainer.max_steps=100001")
    ) == [1]
    run = run_of(tmp_path)
    assert (
        f"{run} is being written by process {first.pid} on "
        in (tmp_path / "second.log").read_text()
    )
    first.kill()
    first.join()
    step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    third = train(
        tmp_path / "third.log", *arguments, "resume=last", f"trainer.max_steps={step + 1}"
    )
    assert ended(third) == [0], (tmp_path / "third.log").read_text()[-2000:]
    assert (run / "finished").exists()


class CtrlCAt(Callback):
    """As a terminal sends it: to every process of the group, in the middle of step `step`."""

    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            for number in range(self.times):
                if number:
                    time.sleep(1.2)
                os.killpg(0, signal.SIGINT)


def test_ctrl_c(tmp_path, many_shards):
    """Beside data workers and wandb's service, which get it, too; the command that is said goes on.
    The second one ends at once."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "data.num_workers=1",
        "logger=wandb", "logger.wandb.offline=true", "trainer.max_steps=4",
        "trainer.val_check_interval=4",
    ]  # fmt: skip
    log = tmp_path / "log"
    assert ended(train(log, *arguments, *added(CtrlCAt, step=2))) == [130], log.read_text()[-2000:]
    run = run_of(tmp_path)
    assert not (run / "finished").exists()
    assert read_adapter_file(run / "checkpoints/last.safetensors")[1]["step"] == 2
    (said,) = [
        line.split()[2:] for line in log.read_text().splitlines() if line.startswith("  go on ")
    ]
    assert said == ["acetate", "train", f"resume={run}"]
    assert ended(train(log, *said[2:], *added(CtrlCAt, step=4, times=2))) == [-signal.SIGINT]
    assert read_adapter_file(run / "checkpoints/last.safetensors")[1]["step"] == 2


def test_ctrl_c_ends_all_ranks(tmp_path, many_shards):
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "data.num_workers=0",
        "loss.diffusion.mode=off", "trainer.max_steps=4", "trainer.val_check_interval=4",
    ]  # fmt: skip
    processes = train_ranks(2, tmp_path / "log", *arguments, *added(CtrlCAt, step=2))
    assert ended(*processes) == [130, 0]
    assert read_adapter_file(run_of(tmp_path) / "checkpoints/last.safetensors")[1]["step"] == 2


@pytest.mark.parametrize("step", [2, 4])
def test_ctrl_c_ends_a_sweep(tmp_path, many_shards, step):
    """Also where it comes in a job's last step, of which nothing is left to do."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "data.num_workers=0",
        "trainer.max_steps=4", "trainer.val_check_interval=4",
        "hydra.sweep.dir=" + str(tmp_path / "sweep"),
    ]  # fmt: skip
    log = tmp_path / "log"
    assert ended(train(log, "-m", *arguments, "task.lr=1e-3,2e-3", *added(CtrlCAt, step=step))) == [
        130
    ]
    assert (tmp_path / "sweep/0/checkpoints/last.ckpt").exists() and not (
        tmp_path / "sweep/1"
    ).exists()
    assert (tmp_path / "sweep/0/finished").exists() == (step == 4)
    assert f"hydra.sweep.dir={tmp_path / 'sweep'} resume=auto" in log.read_text()


def test_wandb_goes_on_under_one_id(tmp_path, many_shards):
    """Read from wandb's own offline files: two processes, one run in one folder."""
    arguments = [
        *small("vae_rgba", tmp_path, many_shards, (many_shards, many_shards)), "logger=wandb",
        "logger.wandb.offline=true", "data.num_workers=0", "trainer.val_check_interval=2",
        "task.decay_steps=4",
    ]  # fmt: skip
    for more in (["trainer.max_steps=2"], ["trainer.max_steps=4", "resume=last"]):
        codes = ended(
            train(tmp_path / "log", *arguments, *more, environment={"WANDB_SILENT": "true"})
        )
        assert codes == [0], (tmp_path / "log").read_text()[-2000:]
    run = run_of(tmp_path)
    identity = f"vae_rgba-{run.name}"
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert all(
        identity.encode() in file.read_bytes() and b"train/loss" in file.read_bytes()
        for file in files
    )
