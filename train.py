"""python train.py experiment=vae_rgba [group=option] [key=value ...]; --help lists what there is."""

from pathlib import Path

import hydra
import lightning
import torch.distributed
from hydra.utils import instantiate
from omegaconf import DictConfig

from acetate.commands.checkpoint import checkpoint_to_resume


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    lightning.seed_everything(config.seed, workers=True)
    checkpoint = checkpoint_to_resume(config.resume, Path(config.paths.outputs) / config.name)
    task = instantiate(config.task)
    data = instantiate(config.data)
    callbacks = [callback for callback in instantiate(config.callbacks).values() if callback is not None]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=instantiate(config.logger))
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads abort a rank that ends with them running
    if config.objective is not None:
        return float(trainer.callback_metrics[config.objective])


if __name__ == "__main__":
    main()
