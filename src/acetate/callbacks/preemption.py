"""Handles signals to training: finishes the step, saves, and ends the process."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from acetate.callbacks.checkpoints import StepCheckpoint
from acetate.lightning_seams import leave_signals_alone, step_is_due

log = logging.getLogger(__name__)

EXIT_CODE = 75  # of rank 0; sysexits.h calls it EX_TEMPFAIL: try again later
STOP, REQUEUE, INTERRUPT = 1, 2, 3  # what a signal asks for; of several, the last in this order
INTERRUPTED = 130  # exit code of rank 0 after Ctrl-C, as shells have it
ONE_PRESS = 1.0  # seconds in which a terminal and torchrun hand on the same Ctrl-C


class Preempted(SystemExit):
    """Training was asked to stop, and has saved where it stands."""


class Preemption(Checkpoint):
    """Ends training when any rank gets one of `signals`: all ranks finish the optimizer step, save
    a checkpoint and end, rank 0 with exit code 75, the others with 0. One of `requeue`, which are
    signals, too, makes rank 0 also put the SLURM job back into the queue (`scontrol requeue`). The
    last step of training ends as ever.

    torchrun's agent hands SIGTERM on to its ranks, kills those that have not ended 30 s later
    (`--shutdown-timeout`), and ends with 1. SIGUSR1 and SIGUSR2 kill it, unless
    `--signals-to-handle=SIGTERM,SIGUSR1,SIGUSR2` has it hand them on. Ranks of srun without
    torchrun get every signal themselves.

    The first SIGINT (Ctrl-C) does the same, with exit code 130; where no step has begun, it ends
    the process, and so does a second one at any time. Of the last step it leaves `interrupted`, as
    nothing of this run is left to save.

    Another signal while the model is loaded, during a validation or a checkpoint waits for the end
    of the step after it. A Checkpoint to Lightning, so that it comes after all callbacks that a
    step changes.
    """

    def __init__(self, signals: Sequence[str], requeue: Sequence[str]):
        names = {item.name: item for item in signal.Signals}
        unknown = [name for name in (*signals, *requeue) if name not in names]
        if unknown:
            raise ValueError(
                f"preemption: {unknown[0]!r} is no signal; such are SIGTERM, SIGUSR1, SIGUSR2."
            )
        self.asks = {names[name]: STOP for name in signals} | {
            names[name]: REQUEUE for name in requeue
        }
        self.asked, self.begun, self.pressed = 0, False, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens to signals from here on, in the place of Lightning, whose handlers save amid a
        step and broadcast amid other collectives."""
        if stage != "fit":
            return
        self.asked, self.begun, self.pressed = 0, False, 0.0
        leave_signals_alone(trainer)
        for number in self.asks:
            signal.signal(number, self._note)
        # as nohup and a shell's & have it
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = True

    @property
    def interrupted(self) -> bool:
        """True where Ctrl-C was pressed since training began."""
        return self.asked == INTERRUPT

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.begun:
            raise Preempted(INTERRUPTED)
        if self.asked < INTERRUPT:
            self.asked, self.pressed = INTERRUPT, time.monotonic()
            os.write(2, b"\nCtrl-C: finishes this step and saves; once more ends at once.\n")
        elif time.monotonic() - self.pressed > ONE_PRESS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, self.asks[signal.Signals(number)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        if not step_is_due(trainer) or trainer.global_step >= trainer.max_steps:
            return
        asked = self.asked
        # one rank's signal may come before, another's after the end of a step
        if trainer.world_size > 1:
            ranks = trainer.strategy.reduce(
                torch.tensor(asked, device=pl_module.device), reduce_op="max"
            )
            asked = int(torch.as_tensor(ranks))
        if not asked:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, StepCheckpoint):
                callback.save(trainer)
        if not trainer.is_global_zero:
            raise Preempted(0)
        log.warning("asked to stop: saved after step %d", trainer.global_step)
        if asked == REQUEUE and "SLURM_JOB_ID" in os.environ:
            requeue()
        raise Preempted(INTERRUPTED if asked == INTERRUPT else EXIT_CODE)


def requeue() -> None:
    """Puts this SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        log.error(
            "%s failed: %s. Start the job again by hand, with resume=last.", " ".join(command), said
        )
