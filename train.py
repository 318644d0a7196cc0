"""python train.py experiment=vae_rgba [group=option] [key=value ...]; --help lists what there is."""

from pathlib import Path

import hydra
import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig

import acetate.commands  # noqa: F401  (registers the resolvers that conf/ uses)


def checkpoint_to_resume(resume: str | None, outputs: Path) -> str | None:
    """A checkpoint path as it is; `last` is the newest last.ckpt below `outputs`."""
    if resume != "last":
        return resume
    found = sorted(outputs.glob("**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"resume=last: no last.ckpt below {outputs}. Leave out resume to start anew.")
    return str(found[-1])


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    lightning.seed_everything(config.seed, workers=True)
    checkpoint = checkpoint_to_resume(config.resume, Path(config.paths.outputs) / config.name)
    task = instantiate(config.task)
    data = instantiate(config.data)
    callbacks = list(instantiate(config.callbacks).values())
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=instantiate(config.logger))
    trainer.fit(task, data, ckpt_path=checkpoint)
    if config.objective is not None:
        return float(trainer.callback_metrics[config.objective])


if __name__ == "__main__":
    main()
