"""Sweeps by submitit, and ranks that torchrun and srun start."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback
from safetensors import safe_open

from acetate.commands import export
from acetate.formats.training import WholeCheckpointIO
from tests.paths import ROOT
from tests.processes import ended, program, train
from tests.test_resume import small

TWO_RANKS = ["trainer.accelerator=cpu", "data.num_workers=0"]
TWO_STEPS = ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.num_workers=0"]
WITHOUT_PLUGIN = """
import runpy, sys, types
sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")  # where Hydra looks for plugins
sys.modules["hydra_plugins"].__path__ = []
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env=variables,
    )


class SignalOnce(Callback):
    """SIGUSR1 of rank 1 to itself, in the first process that is about to train."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == 1 and not self.path.exists():
            self.path.touch()
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture(scope="module")
def clips(many_shards):
    return many_shards, (many_shards, many_shards)


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_in_local_jobs(tmp_path, clips):
    seeds = ["hydra/launcher=local", "seed=1,2", "resume=auto", *TWO_STEPS]
    log = tmp_path.with_suffix(".log")
    code, said = program(log, "train.py", "-m", *small("vae_rgba", tmp_path, *clips), *seeds)
    assert code == 0, said[-3000:]
    (sweep,) = tmp_path.glob("vae_rgba/sweep_*")
    for job, seed in enumerate((1, 2)):
        assert f"seed={seed}" in (sweep / f"{job}/.hydra/overrides.yaml").read_text()
        assert (
            torch.load(sweep / f"{job}/checkpoints/last.ckpt", weights_only=True)["global_step"]
            == 2
        )
        assert (sweep / f"{job}/finished").exists()
    assert list(sweep.glob(".submitit/**/*_submitted.pkl"))


def test_slurm_composes(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose(
            "config",
            ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=4"],
            return_hydra_config=True,
        )
    launcher = config.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.tasks_per_node, launcher.gpus_per_node, launcher.partition) == (4, 4, None)
    assert launcher.signal_delay_s < 60 * launcher.timeout_min
    assert launcher.setup == ["export SLURM_KILL_BAD_EXIT=1"]


@pytest.mark.slow
@pytest.mark.long
def test_without_the_launcher_everything_else_composes(tmp_path):
    file = tmp_path / "without_plugin.py"
    file.write_text(WITHOUT_PLUGIN)
    code, printed = program(tmp_path / "plain", str(file), "experiment=dit_dora", "--cfg", "job")
    assert code == 0, printed[-2000:]
    assert "experiment=vae_rgba" in program(tmp_path / "help", str(file), "--help")[1]
    code, printed = program(tmp_path / "sweep", str(file), "hydra/launcher=slurm", "--cfg", "job")
    assert code != 0 and "submitit_slurm" in printed


@pytest.mark.slow
@pytest.mark.long
def test_torchrun(tmp_path, clips):
    """A sharded run whose agent gets SIGTERM, as at the end of a SLURM job's time, goes on to its
    end."""
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
        "trainer=fsdp",
        "trainer.accelerator=cpu", *small("vae_rgba", tmp_path, *clips), "data.num_workers=1",
        "loss.diffusion.mode=off", "+trainer.limit_val_batches=0",
        "callbacks.checkpoint.every_n_train_steps=1",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(
            [sys.executable, *command, "trainer.max_steps=100000"], cwd=ROOT, stdout=log, stderr=log
        )
        while not list(tmp_path.glob("vae_rgba/*/checkpoints/last.ckpt")) and agent.poll() is None:
            time.sleep(0.1)
        agent.send_signal(signal.SIGTERM)
        agent.wait(60)
    said = (tmp_path / "log").read_text()
    asked = re.search(r"asked to stop: saved after step (\d+)", said)
    assert asked and "forcefully exiting" not in said, said[-3000:]
    done = run(*command, f"trainer.max_steps={int(asked[1]) + 1}", "resume=last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_one_run(tmp_path, steps=int(asked[1]) + 1)
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        settings = [
            f"paths.root={ROOT}",
            f"checkpoint={tmp_path}",
            "to=acetate",
            f"out={tmp_path / 'out'}",
        ]
        export.main(compose("command/export", settings))
    (exported,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(exported, "pt") as file:
        assert json.loads(file.metadata()["step"]) == int(asked[1]) + 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("runs")
def test_srun(tmp_path, clips):
    """Two processes in the environment that srun gives them, and again, once they were asked to
    stop and requeued."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranks(restart: int, *more: str) -> list[int | None]:
        environment = {
            "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_RESTART_COUNT": str(restart), "MASTER_PORT": str(port + restart),
            "PATH": f"{tmp_path}:/usr/bin:/bin",
        }  # fmt: skip
        settings = [
            *small("vae_rgba", tmp_path, *clips),
            *TWO_STEPS,
            *TWO_RANKS,
            "resume=auto",
            *more,
        ]
        return ended(
            *(
                train(
                    tmp_path / f"log_{rank}",
                    *settings,
                    environment={
                        **environment,
                        "SLURM_PROCID": str(rank),
                        "SLURM_LOCALID": str(rank),
                    },
                )
                for rank in range(2)
            )
        )

    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    scontrol.chmod(0o755)
    once = {"_target_": "tests.test_launchers.SignalOnce", "path": str(tmp_path / "signalled")}
    more = [f"+callbacks.signal.{key}={value}" for key, value in once.items()]
    assert ranks(0, *more) == [75, 0], (tmp_path / "log_0").read_text()[-3000:]
    assert (tmp_path / "said").read_text() == "requeue 1234\n"
    assert ranks(1, *more) == [0, 0], (tmp_path / "log_0").read_text()[-3000:]
    assert assert_one_run(tmp_path).name == "slurm_1234_0"


def assert_one_run(outputs: Path, steps: int = 2) -> Path:
    """Of all ranks together, with one record of its settings, trained to the end."""
    (run_folder,) = outputs.glob("vae_rgba/*")
    assert (run_folder / ".hydra/overrides.yaml").exists() and (run_folder / "finished").exists()
    checkpoint = WholeCheckpointIO().load_checkpoint(
        run_folder / "checkpoints/last.ckpt", weights_only=True
    )
    assert checkpoint["global_step"] == steps
    return run_folder
