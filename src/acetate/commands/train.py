"""Runs training from its config to its last step."""

from contextlib import nullcontext
from pathlib import Path

import lightning
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from acetate.callbacks.preemption import INTERRUPTED, Preempted, Preemption
from acetate.commands.checkpointing import settle_checkpointing
from acetate.commands.loggers import build_loggers, build_story, finish_loggers
from acetate.commands.runs import FINISHED, checkpoint_to_resume, only_writer
from acetate.commands.same_base import SameBase
from acetate.commands.start import StartFrom
from acetate.data.latents import LatentDataModule
from acetate.formats.checkpoints import step_of
from acetate.formats.resumable import check_optimizers, check_resumable
from acetate.lightning_seams import guard_resume


def main(config: DictConfig) -> float | None:
    """Trains, and returns the value of the metric `objective` at the last validation; None where
    there was none."""
    run = Path(config.paths.run)
    checkpoint = checkpoint_to_resume(_in_a_sweep(config.resume), run)
    if checkpoint is not None and _is_over(config, run, checkpoint):
        return None
    check_average(config)
    data = instantiate(config.data)
    config = settle_checkpointing(config, checkpoint, data)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    task = instantiate(config.task)
    callbacks = [
        callback for callback in instantiate(config.callbacks).values() if callback is not None
    ]
    if isinstance(data, LatentDataModule):
        given = OmegaConf.select(config, "rgba_vae")
        adapters = list(given) if OmegaConf.is_list(given) else given
        callbacks.append(SameBase(config.wan.vae, adapters))
    if config.init is not None and checkpoint is None:
        callbacks.append(StartFrom(config.init))
    loggers = build_loggers(config)
    trainer = instantiate(
        config.trainer,
        callbacks=[*callbacks, build_story(config)],
        logger=loggers,
        context_parallel=OmegaConf.select(config, "task.context_parallel", default=1),
    )
    # callbacks, which compare the ranks' in setup, do not know an argument of fit
    trainer.ckpt_path = checkpoint
    guard_resume(trainer, check_resumable, check_optimizers)
    with only_writer(run) if trainer.is_global_zero else nullcontext():
        failed = True
        try:
            trainer.fit(task, data, weights_only=True)
            failed = False
        except Preempted:
            _close_process_group()
            raise
        finally:
            finish_loggers(loggers, failed)
        _close_process_group()
    if any(isinstance(callback, Preemption) and callback.interrupted for callback in callbacks):
        # in its last step: the run is whole, and a sweep begins no other
        raise Preempted(INTERRUPTED)
    # a run that had ended before has measured nothing
    objective = trainer.callback_metrics.get(config.objective)
    return None if objective is None else float(objective)


def check_average(config: DictConfig) -> None:
    """Raises ValueError for a schedule-free optimizer without a callback that takes its average."""
    name = OmegaConf.select(config, "task.optimizer") or ""
    if name.startswith("schedulefree.") and OmegaConf.select(config, "callbacks.ema") is None:
        raise ValueError(
            f"task.optimizer={name} trains towards an average, which callbacks=ema validates "
            "and exports. Add callbacks=ema."
        )


def _in_a_sweep(resume: str | None) -> str | None:
    """Turns `last` into `auto` in a sweep that goes on, since its job may not have begun."""
    return "auto" if resume == "last" and HydraConfig.get().mode == RunMode.MULTIRUN else resume


def _is_over(config: DictConfig, run: Path, checkpoint: str) -> bool:
    """Returns whether nothing is left to train, which ends a job of a sweep in peace. Raises
    ValueError in a run of its own."""
    own = Path(checkpoint).resolve().parents[1] == run.resolve()
    step = step_of(Path(checkpoint))
    if step < config.trainer.max_steps or (own and not (run / FINISHED).exists()):
        return False
    said = (
        f"{checkpoint} stands at step {step}, trainer.max_steps={config.trainer.max_steps}: "
        "nothing to train"
    )
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print(said)
        return True
    raise ValueError(
        f"{said}. Give a larger trainer.max_steps, or init={Path(checkpoint).parents[1]} to start "
        "a new run from it."
    )


def _close_process_group() -> None:
    """Closes the process group, whose threads abort a rank that ends with them running."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
