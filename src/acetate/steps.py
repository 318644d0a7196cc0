"""Counts training in optimizer steps, and in nothing else: validations, logs and logged values."""

from typing import Any, cast

from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from acetate import lightning_seams as seams


class StepTrainer(Trainer):
    """A Lightning trainer with val_check_interval and log_every_n_steps in optimizer steps.

    All that is logged stands at N, the number of finished steps, with `epoch`, the passes over the
    training data, where the data module counts them (`passes`). Several devices or processes use
    DDP unless a strategy is given. find_unused_parameters: DDP's own. context_parallel: ranks that
    share their clips. Raises ValueError where it does not divide them.
    """

    datamodule: Any  # set by Lightning, which does not say so
    log_every_n_steps: int

    def __init__(
        self, *, find_unused_parameters: bool = False, context_parallel: int = 1, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if self.world_size % context_parallel:
            raise ValueError(
                f"task.context_parallel={context_parallel} processes share a clip, this run has "
                f"{self.world_size}. Start a multiple of {context_parallel}, or give "
                "task.context_parallel=1."
            )
        self.context_parallel = context_parallel
        if isinstance(self.strategy, DDPStrategy) and settings.get("strategy", "auto") == "auto":
            unused = find_unused_parameters  # buffers never change
            seams.set_ddp(self.strategy, find_unused_parameters=unused, broadcast_buffers=False)
        seams.count_in_steps(self)

    @property
    def validation_due(self) -> bool:
        """True where a validation belongs after the step that was just finished."""
        if not self.global_step or not seams.step_is_due(self) or not seams.validates(self):
            return False
        return self.global_step % self.val_check_interval == 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """Number of readers of clips, and which one this rank is: ranks that share their clips are
        one."""
        place = super().distributed_sampler_kwargs
        return place and {name: value // self.context_parallel for name, value in place.items()}

    @property
    def passes(self) -> float:
        """Passes over the training data, of all ranks together; Lightning's epochs where nothing
        counts them."""
        return float(getattr(self.datamodule, "passes", self.current_epoch))


def reader(trainer: Trainer) -> tuple[int, int]:
    """Returns which reader of clips this rank is, and how many there are."""
    place = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return place["rank"], place["num_replicas"]


def ends_step(task: LightningModule) -> bool:
    """Returns in training_step whether the optimizer steps after this batch."""
    return seams.step_is_due(task.trainer)


def logs_step(task: LightningModule) -> bool:
    """Returns in training_step whether loggers write what this step logs; never for a task without
    a trainer."""
    if not seams.has_trainer(task):
        return False
    trainer = cast(StepTrainer, task.trainer)
    every = trainer.log_every_n_steps
    return every > 0 and (trainer.global_step + 1) % every == 0
