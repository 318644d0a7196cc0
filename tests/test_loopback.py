"""Runs on one machine: what their processes listen on while they train."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from acetate.torchrun import NAME, settled
from tests.paths import ROOT

SMALL = [
    "experiment=vae_rgba", "data.frames=5", "data.height=16", "data.width=16", "data.batch_size=1",
    "data.num_workers=0", "data.val_clips=2", "loss.diffusion.mode=off", "trainer=ddp",
    "trainer.max_steps=100000", "trainer.accelerator=cpu", "+trainer.limit_val_batches=0",
    "callbacks.checkpoint.every_n_train_steps=1",
]  # fmt: skip


def listening(process):
    """(address, port) of all that it and its children serve."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        for socket in one.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN:
                found.add((socket.laddr.ip.removeprefix("::ffff:"), socket.laddr.port))
    return found


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ("--nproc-per-node=2", True), ("--standalone --nnodes=1", True), ("--nnodes 1:1", True),
        ("--master-addr 127.0.0.1 --master-port 29511", True),
        ("--rdzv_backend=c10d --rdzv_endpoint=localhost:29555", True),
        ("--rdzv-backend c10d --rdzv-endpoint [::1]:29400", True), ("--nnodes=2", False),
        ("--nnodes=1:4", False), ("--master-addr 10.0.0.1", False),
        ("--rdzv-backend=etcd --rdzv-endpoint=localhost:1", False),
    ],
)  # fmt: skip
def test_options_that_need_no_other_machine_are_of_one(options, alone):
    assert (settled([*options.split(), "train.py"]).rdzv_backend == NAME) is alone


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "acetate.torchrun", "--nproc-per-node", "2", "train.py"],
        ["-m", "acetate.torchrun", "--standalone", "--nnodes=1", "--nproc-per-node=2", "train.py"],
        ["train.py", "trainer.devices=2"],
    ],
)
def test_two_ranks_listen_on_loopback_alone(tmp_path, many_shards, command):
    places = [f"paths.outputs={tmp_path}", f"paths.cache={tmp_path}", f"data.shards={many_shards}"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, *command, *SMALL, *places],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
        )
    process = psutil.Process(run.pid)
    try:
        while not list(tmp_path.glob("vae_rgba/*/checkpoints/last.ckpt")):
            assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        found = listening(process)
    finally:
        with suppress(psutil.NoSuchProcess):
            for one in (*process.children(recursive=True), process):
                one.kill()
        run.wait(30)
    assert found and {ip for ip, _ in found} <= {"127.0.0.1", "::1"}, found
