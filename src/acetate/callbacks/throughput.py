"""Measures how fast training goes and what holds it up."""

import resource
import sys
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from acetate.lightning_seams import log_row, step_is_due
from acetate.steps import reader


class Throughput(Callback):
    """Logs means over each window of `every_n_steps` optimizer steps; time around validation is
    left out.

    perf/clips_per_s, perf/frames_per_s (all ranks together; frames only where the batch holds
    video), perf/step_s (its batches, each from batch in hand to batch done), perf/data_wait_share
    (between batches: loading, transfer, checkpoints; in [0, 1] of the window), perf/peak_gpu_gib
    (allocated since the start) or, without a GPU, perf/peak_rss_gib (this process). The device is
    synchronised once per window only, so where batches are queued ahead of the GPU the share reads
    too high, never too low.
    """

    def __init__(self, every_n_steps: int):
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps}; a window holds at least 1 step. Use 50."
            )
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = perf_counter()
        # end of the last batch; None where the wait is not the loader's
        self._ended: float | None = None
        self._open_window()

    def _open_window(self) -> None:
        self._steps = self._clips = self._frames = 0
        self._busy = self._wait = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = perf_counter()
        if self._ended is not None:
            self._wait += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = step_is_due(trainer)
        self._steps += stepped
        clips = sum(map(bool, batch["key"]))  # one without a key stands in for bad ones
        self._clips += clips
        for name in ("rgb", "video"):
            if name in batch:  # (B, 3, T, H, W)
                self._frames += clips * batch[name].shape[2]
        last = stepped and trainer.global_step % self.every_n_steps == 0
        if last and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._ended = perf_counter()
        self._busy += self._ended - self._started
        if last:
            log_row(trainer, self._metrics(reader(trainer)[1], pl_module.device))
            self._open_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def _metrics(self, readers: int, device: torch.device) -> dict[str, float]:
        seconds = self._busy + self._wait
        metrics = {
            "perf/clips_per_s": readers * self._clips / seconds,
            "perf/step_s": self._busy / self._steps,
            "perf/data_wait_share": self._wait / seconds,
        }
        if self._frames:
            metrics["perf/frames_per_s"] = readers * self._frames / seconds
        if device.type == "cuda":
            metrics["perf/peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            metrics["perf/peak_rss_gib"] = peak / 2**30
        return metrics
