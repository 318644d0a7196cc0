"""python train.py experiment=vae_rgba [group=option] [key=value ...]; --help lists what there is."""

from contextlib import nullcontext
from pathlib import Path

import hydra
import lightning
import torch.distributed
from hydra.utils import instantiate
from omegaconf import DictConfig

from acetate.callbacks.preemption import Preempted
from acetate.commands.loggers import build_loggers, build_story, finish_loggers
from acetate.commands.runs import checkpoint_to_resume, only_writer


def close_process_group() -> None:
    """Its threads abort a rank that ends with them running."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    lightning.seed_everything(config.seed, workers=True)
    run = Path(config.paths.run)
    checkpoint = checkpoint_to_resume(config.resume, run)
    task = instantiate(config.task)
    data = instantiate(config.data)
    callbacks = [callback for callback in instantiate(config.callbacks).values() if callback is not None]
    loggers = build_loggers(config)
    trainer = instantiate(config.trainer, callbacks=[*callbacks, build_story(config)], logger=loggers)
    trainer.ckpt_path = checkpoint  # callbacks, which compare the ranks' in setup, do not know an argument of fit
    with only_writer(run) if trainer.is_global_zero else nullcontext():
        failed = True
        try:
            trainer.fit(task, data, weights_only=True)
            failed = False
        except Preempted:
            close_process_group()
            raise
        finally:
            finish_loggers(loggers, failed)
        close_process_group()
    objective = trainer.callback_metrics.get(config.objective)  # a run that had ended before has measured nothing
    return None if objective is None else float(objective)


if __name__ == "__main__":
    main()
