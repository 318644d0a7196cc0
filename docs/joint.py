"""The first table of docs/joint.md: what a training step of both schemes takes, side by side.

python docs/joint.py [repeats=9] [name=value ...]    settings of both experiments, such as wan=tiny
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from acetate.commands import estimate
from acetate.commands.program import composed
from acetate.memory import Load
from acetate.models.loading import load_vae
from acetate.models.wan import Geometry
from acetate.tasks.example import MeasuredTask

EXPERIMENTS = ("dit_dora", "dit_joint")
UNUSED = ("data.latents=x",)


class Step:
    """A training step of an experiment on random latents, with its optimizer."""

    def __init__(self, config: DictConfig, load: Load, device: str) -> None:
        self.task: MeasuredTask = instantiate(config.task)
        self.task.configure_model()
        self.task.to(device)
        batch = self.task.example_batch(load, Geometry.of(load_vae(config.wan.vae)))
        self.batch: dict[str, Any] = {
            name: torch.randn(value.shape, device=device) if torch.is_tensor(value) else value
            for name, value in batch.items()
        }
        self.trained = [p for p in self.task.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)
        self.device, self.wall, self.cpu = device, [], []

    @property
    def tokens(self) -> int:
        """Of one clip, colour and alpha."""
        latents, transformer = self.batch["latents"], self.task.transformer
        cells = latents[0, 0].numel()
        return cells // int(torch.tensor(transformer.config.patch_size).prod())

    def run(self) -> None:
        """Takes a step and notes its seconds by the clock and of this process."""
        began, worked = time.perf_counter(), time.process_time()
        self.task.example_loss(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - worked)


def main(arguments: Sequence[str]) -> None:
    own = [text for text in arguments if text.startswith("repeats=")]
    repeats = int(own[-1].partition("=")[2]) if own else 9
    given = [text for text in arguments if text not in own]
    configs = {
        name: composed("config", [f"experiment={name}", *UNUSED, *given]) for name in EXPERIMENTS
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {name: estimate.footprint(config) for name, config in configs.items()}
    steps = {name: Step(config, found[name][0], device) for name, config in tqdm(configs.items())}
    for _ in tqdm(range(repeats + 1)):  # in turns: what else this machine does is shared
        for step in steps.values():
            step.run()
    print(f"{found[EXPERIMENTS[0]][0]} on {device}, {torch.get_num_threads()} threads")
    for name, step in steps.items():
        footprint = found[name][1]
        wall, cpu = (statistics.median(seconds[1:]) for seconds in (step.wall, step.cpu))
        print(
            f"{name}: {step.tokens} tokens a clip; a step {wall:.2f} s, {cpu:.2f} s of the CPU; "
            f"{footprint.trainable_parameters:,} parameters train; by estimate "
            f"{footprint.per_gpu(1)['total'] / 2**20:,.0f} MiB, {footprint.flops / 1e9:,.1f} GFLOP"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
