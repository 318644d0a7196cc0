"""Chooses the folder that a run writes to, and the checkpoint that it goes on from."""

import fcntl
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from acetate.formats.layout import is_sharded
from acetate.replacing import standing

log = logging.getLogger(__name__)

LAST = "checkpoints/last.ckpt"
RECORD = ".hydra"  # in a run's folder: the config and the overrides that it was started with
# in a run's folder: an empty file, there once training has reached its last step
FINISHED = "finished"
# in a run's folder: a file that names the process that last wrote there, which locks it
LOCK = ".lock"
# seconds; in less, file servers take its locks from a machine that is gone (NFSv4 90, Lustre 100)
LEASE = 150.0


def run_folder(
    outputs: str, name: str, resume: str | None, overrides: Sequence[str], now: str
) -> str:
    """Returns outputs/NAME/TIME, or the run that resume chooses: `last` the newest that has a
    checkpoint, `auto` the newest such that is not finished and was started with the same overrides.
    All ranks of torchrun and srun get the same.

    A new folder is made here, so that runs that start in the same second have one each. srun's
    ranks name it after the job, torchrun's hear of rank 0's choice.
    """
    runs = Path(outputs) / name
    going_on = None
    if resume == "last":
        going_on = newest(runs)
    elif resume == "auto":
        going_on = newest(
            runs, lambda run: not (run / FINISHED).exists() and _started_with(run, overrides)
        )
    if going_on is None and "SLURM_STEP_ID" in os.environ and not _torchrun():
        now = f"slurm_{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_STEP_ID']}"
        again = os.environ.get("SLURM_RESTART_COUNT", "0")  # requeued without resume: a new run
        return str(runs / (now + (f"_{again}" if again != "0" else "")))
    if rank() == 0 and going_on is None and resume != "last":
        going_on = new_folder(runs / now)
    return _of_rank_zero(str(going_on or runs / now))


def sweep_folder(
    outputs: str, name: str, resume: str | None, overrides: Sequence[str], now: str
) -> str:
    """Makes outputs/NAME/sweep_TIME; with resume it returns the newest sweep of the same command,
    if there is one."""
    runs = Path(outputs) / name
    if resume in ("last", "auto"):
        same = [
            sweep
            for sweep in runs.glob("sweep_*")
            if _settings(overrides) == _settings(overrides_of_sweep(sweep))
        ]
        if same:
            return str(max(same, key=lambda sweep: sweep.stat().st_ctime))
    return str(new_folder(runs / f"sweep_{now}"))


def new_folder(wanted: Path) -> Path:
    """Makes the folder or, where it exists, the next free one of FOLDER_2, FOLDER_3, ..."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def overrides_of_sweep(sweep: Path) -> list[str]:
    """Returns the overrides that the sweep was started with, as Hydra notes them; none where a
    sweeper writes no note."""
    record = sweep / "multirun.yaml"
    return list(OmegaConf.load(record).hydra.overrides.task) if record.exists() else []


def record_folder(run: str, now: str) -> str | None:
    """Returns the place below a run's folder where Hydra notes how it was started; a run that goes
    on keeps its first notes.

    None on other ranks than 0: one of them writes.
    """
    if rank() > 0:
        return None
    return f"{RECORD}/{now}" if (Path(run) / RECORD).exists() else RECORD


def run_id(outputs: str, run: str) -> str:
    """Returns NAME-TIME, which stays the same for a run that goes on in its folder."""
    folder = Path(run)
    parts = (
        folder.relative_to(outputs).parts if folder.is_relative_to(outputs) else folder.parts[-2:]
    )
    return "-".join(parts or [folder.name]).replace("/", "")


def checkpoint_to_resume(resume: str | None, run: Path) -> str | None:
    """Returns a checkpoint's path as it is, or the last one of a run's folder; `last` means the
    run's own, `auto` that where there is one. Raises FileNotFoundError, and ValueError for a file
    that is no checkpoint of training."""
    if resume in (None, "last", "auto"):
        own = standing(run / LAST)
        if resume is None or (resume == "auto" and not own.exists()):
            return None
        if not own.exists():
            raise FileNotFoundError(
                f"resume=last: no last.ckpt below {run.parent}. Leave out resume to start anew."
            )
        return str(own)
    source = Path(resume).expanduser()
    below = newest(source) or source  # of the folder of a name
    given = next(
        (path for path in map(standing, (source / LAST, below / LAST, source)) if path.exists()),
        None,
    )
    if given is None:
        raise FileNotFoundError(
            f"resume={resume} does not exist. Give a .ckpt file, `last` for the newest run, or "
            "`auto`."
        )
    if given.suffix != ".ckpt" or not (given.is_file() or is_sharded(given)):
        raise ValueError(
            f"resume={resume} is no checkpoint of training. Such is a .ckpt, file or folder of "
            f"shards; a run's folder stands for its {LAST}. Leave out resume to start anew."
        )
    return str(given)


@contextmanager
def only_writer(run: Path, patience: float = LEASE) -> Iterator[None]:
    """Keeps the run's folder to rank 0 of this process's job; reaching the end of it marks the run
    as finished.

    The kernel unlocks the folder when the process ends, however it does, but not when its data
    workers do. Raises RuntimeError at once where another process of this machine writes there; one
    of another machine, which may be gone without its file server having noticed, has `patience`
    seconds.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+") as file:
        _lock(file, run, patience)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        (run / FINISHED).unlink(missing_ok=True)
        yield
        (run / FINISHED).touch()


def _lock(file: IO[str], run: Path, patience: float) -> None:
    deadline, waits = time.monotonic() + patience, False
    while True:
        try:
            # not flock, which forked data workers would go on holding
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):  # which of them is up to the system
            file.seek(0)
            holder = file.read()
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): see to it that no other process trains there",
                run,
                error.strerror,
            )
            return
        if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > deadline:
            raise RuntimeError(
                f"{run} is being written by process {holder}, and by one at a time. Wait until it "
                "has ended, or end it (SIGTERM: it saves where it stands), then go on with "
                "resume=last; without resume a new run starts."
            )
        if not waits:
            log.warning(
                "%s is being written by process %s; waiting for it, %.0f s at most",
                run,
                holder,
                patience,
            )
        waits = True
        time.sleep(min(1.0, patience))


def rank() -> int:
    """Returns this process's place among those that torchrun or srun started."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def newest(runs: Path, chosen: Callable[[Path], bool] = lambda run: True) -> Path | None:
    """Returns the newest run with a checkpoint; a sweep's jobs are runs, too, but are not found
    here."""
    found = [
        last for run in runs.glob("*") if (last := standing(run / LAST)).exists() and chosen(run)
    ]
    return max(found, key=lambda path: path.stat().st_mtime).parents[1] if found else None


def _started_with(run: Path, overrides: Sequence[str]) -> bool:
    """Returns whether the run was started with the same overrides but for `resume`, in any
    order."""
    record = run / RECORD / "overrides.yaml"
    before = OmegaConf.to_object(OmegaConf.load(record)) if record.exists() else None
    return isinstance(before, list) and _settings(before) == _settings(overrides)


def _settings(overrides: Sequence[str]) -> list[str]:
    return sorted(override for override in overrides if not override.startswith("resume="))


def _of_rank_zero(value: str) -> str:
    """Returns rank 0's value on every rank under torchrun, by the store that its agent serves; else
    the value."""
    if (
        not _torchrun()
        or os.environ["WORLD_SIZE"] == "1"
        or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ):
        return value
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    # the store outlives a restart of the ranks
    key = f"acetate/run/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if rank() == 0:
        store.set(key, value)
    return store.get(key).decode()
