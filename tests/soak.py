"""python -m tests.soak [kills=20] [seed=0] [steps=4 * kills] [workers=2]: training that is killed again and again.

Kills a run at random moments: itself at any time, itself while it writes a checkpoint, one of its data workers. Each
time the same command goes on (resume=auto). In the end everything is compared, bit for bit, with a run that nobody
killed: weights, optimizer, average, position in the data, metrics.csv.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from omegaconf import OmegaConf
from tqdm import tqdm

from data_prep.synthesize import synthesize
from tests.runs import ended, train
from tests.test_resume import assert_same_run, run_of, small

KINDS = ("process", "checkpoint", "worker")
CHECKPOINT_EVERY = 3  # steps
PATIENCE = 300.0  # seconds for anything that has to happen


def soak(folder: Path, *, kills: int, seed: int, steps: int, workers: int) -> Counter[str]:
    """How often what was killed, `half a checkpoint` where one was left behind. Raises AssertionError."""
    chance, counts = random.Random(seed), Counter()
    shards = folder / "shards"
    synthesize(out=shards, clips=12, frames=5, sizes=[16], seed=0, val_fraction=0.2, max_clips=100, max_bytes=10**9)

    def start(outputs: Path) -> BaseProcess:
        arguments = [
            *small("vae_rgba", outputs, shards, (shards, shards)), f"data.num_workers={workers}",
            f"trainer.max_steps={steps}", f"callbacks.checkpoint.every_n_train_steps={CHECKPOINT_EVERY}",
            f"trainer.val_check_interval={4 * CHECKPOINT_EVERY}", "loss.diffusion.mode=off",
            "callbacks.throughput=null", "resume=auto",
        ]  # fmt: skip
        return train(folder / f"{outputs.name}.log", *arguments)

    whole, parts = folder / "whole", folder / "parts"
    process = start(whole)
    until(lambda: len(children(process)) >= workers, process)
    began = time.monotonic()
    assert ended(process, within=PATIENCE * 4) == [0], log_of(whole)
    share = (time.monotonic() - began) / (2 * kills)  # what a kill lets pass on average
    for number in tqdm(range(kills), unit="kill"):
        kind = KINDS[number % len(KINDS)]
        left = half_written(parts)
        process = start(parts)
        if kind == "checkpoint":
            until(lambda left=left: half_written(parts) - left, process)
            time.sleep(chance.uniform(0, 0.02))
        elif kind == "process" and chance.random() < 0.3:
            time.sleep(chance.uniform(0, 2))  # before it trains
        else:
            until(lambda process=process: len(children(process)) >= workers, process)
            time.sleep(chance.uniform(0, 2 * share))
        assert process.is_alive(), f"ended before it was killed; give it more than steps={steps}: {log_of(parts)}"
        counts[kind] += 1
        if kind == "worker":
            for worker in chance.sample(children(process), k=min(1, len(children(process)))):
                worker.kill()
            (code,) = ended(process, within=PATIENCE)
            said = log_of(parts)
            assert code == 1 and "DataLoader worker (pid" in said, f"exit code {code}: {said}"
        else:
            process.kill()
            process.join()
        counts["half a checkpoint"] += bool(half_written(parts) - left)
    assert ended(start(parts), within=PATIENCE * 4) == [0], log_of(parts)
    assert_same_run(run_of(whole), run_of(parts))
    return counts


def half_written(outputs: Path) -> set[Path]:
    """Checkpoints."""
    return set(outputs.glob("*/*/checkpoints/.*.tmp"))


def children(process: BaseProcess) -> list[psutil.Process]:
    """Data workers."""
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def until(happens, process: BaseProcess) -> None:
    """Waits while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and not happens():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


def log_of(outputs: Path) -> str:
    return outputs.with_suffix(".log").read_text()[-3000:]


if __name__ == "__main__":
    settings = {"kills": 20, "seed": 0, "workers": 2} | dict(OmegaConf.from_cli(sys.argv[1:]))
    settings.setdefault("steps", 4 * settings["kills"])
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        found = soak(Path(place), **settings)
    print(f"{dict(found)} in {time.monotonic() - began:.0f} s: the same run, bit for bit")
