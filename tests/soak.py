"""python -m tests.soak [kills=20] [seed=0] [steps=6 * kills] [workers=2] [trainer=default]
[ranks=1]: training that is killed again and again.

Kills a run at random moments: one of its ranks at any time, one while a checkpoint is being
written, one of their data workers. Each time the same command goes on (resume=auto). In the end
everything is compared, bit for bit, with a run that nobody killed: weights, optimizer, average,
position in the data, metrics.csv.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from omegaconf import OmegaConf
from tqdm import tqdm

from data_prep.synthesize import synthesize
from tests.processes import ended, train_ranks
from tests.test_resume import assert_same_run, run_of, small

# a worker first: towards its end a run has none, while a checkpoint is always still to come
KINDS = ("worker", "process", "checkpoint")
CHECKPOINT_EVERY = 3  # steps
PATIENCE = 300.0  # seconds for anything that has to happen


def soak(
    folder: Path,
    *,
    kills: int,
    seed: int,
    steps: int,
    workers: int,
    trainer: str = "default",
    ranks: int = 1,
) -> Counter[str]:
    """How often what was killed, `half a checkpoint` where one was left behind. Raises
    AssertionError."""
    chance, counts = random.Random(seed), Counter()
    shards = folder / "shards"
    synthesize(
        out=shards,
        clips=14,
        frames=5,
        sizes=[16],
        seed=0,
        val_fraction=0.4,
        max_clips=100,
        max_bytes=10**9,
    )

    def start(outputs: Path) -> list[BaseProcess]:
        arguments = [
            *small("vae_rgba", outputs, shards, (shards, shards)), f"data.num_workers={workers}",
            f"trainer={trainer}", f"trainer.max_steps={steps}",
            f"callbacks.checkpoint.every_n_train_steps={CHECKPOINT_EVERY}",
            f"trainer.val_check_interval={4 * CHECKPOINT_EVERY}", "loss.diffusion.mode=off",
            "callbacks.throughput=null", "resume=auto",
        ]  # fmt: skip
        return train_ranks(ranks, folder / f"{outputs.name}.log", *arguments)

    whole, parts = folder / "whole", folder / "parts"
    run = start(whole)
    until(lambda: len(data_workers(run)) >= workers * ranks, run)
    began = time.monotonic()
    assert ended(*run, within=PATIENCE * 4) == [0] * ranks, log_of(whole)
    share = (time.monotonic() - began) / (2 * kills)  # what a kill lets pass on average
    for number in tqdm(range(kills), unit="kill"):
        kind, since = KINDS[number % len(KINDS)], time.time()
        run = start(parts)
        kind, victims = caught(run, kind, parts, chance, 2 * share, workers * ranks)
        counts[kind] += 1
        for victim in victims:
            victim.kill()
        codes = ended(*run, within=PATIENCE)
        assert not {0, None} & set(codes), f"exit codes {codes}: {log_of(parts)}"
        if kind == "worker":
            assert "DataLoader worker (pid" in log_of(parts), log_of(parts)
        if kind == "checkpoint":
            counts["half a checkpoint"] += bool(half_written(parts, since))
    assert ended(*start(parts), within=PATIENCE * 4) == [0] * ranks, log_of(parts)
    assert_same_run(run_of(whole), run_of(parts))
    return counts


def caught(
    run: list[BaseProcess],
    kind: str,
    outputs: Path,
    chance: random.Random,
    longest: float,
    workers: int,
) -> tuple[str, Sequence[BaseProcess | psutil.Process]]:
    """Waits for a moment to kill at; returns what is killed then, and its processes."""
    if kind == "process" and chance.random() < 0.3:
        time.sleep(chance.uniform(0, 2))  # before it trains
        assert running(run), log_of(outputs)
        return kind, run  # ranks that still wait for each other would go on to
    if kind == "checkpoint":
        since = time.time()
        until(lambda: half_written(outputs, since), run)
        time.sleep(chance.uniform(0, 0.02))
    else:
        until(lambda: len(data_workers(run)) >= workers, run)
        time.sleep(chance.uniform(0, longest))
    assert running(run), f"ended before it was killed; give it more steps: {log_of(outputs)}"
    victims = data_workers(run) if kind == "worker" else run
    if not victims:  # its workers have ended, as it saves the last step
        return "process", [chance.choice(run)]
    return kind, [chance.choice(victims)]


def half_written(outputs: Path, since: float) -> list[Path]:
    """Checkpoints, and adapters beside them; what an earlier kill left may lie there for ever, in a
    run of no use."""
    found = []
    for path in outputs.glob("*/*/checkpoints/.*.tmp"):
        with suppress(FileNotFoundError):
            found += [path] if path.stat().st_mtime > since else []
    return found


def data_workers(run: Sequence[BaseProcess]) -> list[psutil.Process]:
    found = []
    for rank in run:
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(rank.pid).children()
    return found


def running(run: Sequence[BaseProcess]) -> bool:
    return all(rank.is_alive() for rank in run)


def until(happens: Callable[[], object], run: Sequence[BaseProcess]) -> None:
    """Waits while the run runs."""
    deadline = time.monotonic() + PATIENCE
    while running(run) and not happens():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


def log_of(outputs: Path) -> str:
    return "".join(
        log.read_text()[-3000:] for log in sorted(outputs.parent.glob(f"{outputs.name}.log_*"))
    )


if __name__ == "__main__":
    settings = {"kills": 20, "seed": 0, "workers": 2} | dict(OmegaConf.from_cli(sys.argv[1:]))
    settings.setdefault("steps", 6 * settings["kills"])
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        found = soak(Path(place), **settings)
    print(f"{dict(found)} in {time.monotonic() - began:.0f} s: the same run, bit for bit")
