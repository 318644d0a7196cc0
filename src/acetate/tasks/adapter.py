"""The base of tasks that train adapters on a frozen base: checkpoints hold the adapters alone."""

import json
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh

from acetate.models.adapters import ADAPTER_SCHEMA, load_trainable, read_facts, trainable_state
from acetate.steps import reader
from acetate.tasks.optim import linear, optimizer_class, with_warmup


class AdapterTask(LightningModule):
    """Saves and loads exactly the parameters that train; the frozen base is never in a checkpoint.

    lr, warmup_steps, decay_steps, betas, weight_decay, optimizer: as in `with_warmup`. Raises
    ValueError for an optimizer that is not known.
    """

    warmup = staticmethod(linear)

    def __init__(
        self,
        *,
        lr: float,
        warmup_steps: int,
        decay_steps: int | None,
        betas: Sequence[float],
        weight_decay: float,
        optimizer: str = "AdamW",
    ) -> None:
        super().__init__()
        optimizer_class(optimizer)  # at once, not when the run has its folder
        self.lr, self.warmup_steps, self.decay_steps = lr, warmup_steps, decay_steps
        self.betas, self.weight_decay, self.optimizer = betas, weight_decay, optimizer
        self.strict_loading = False  # on_load_checkpoint is strict about what trains
        self._schedule_before: dict[str, Any] = {}  # of the checkpoint that the run goes on from

    @property
    def shards(self) -> DeviceMesh | None:
        """The ranks that weights are sharded over; None where each holds all of them."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"]

    def configure_optimizers(self) -> dict[str, Any]:
        return with_warmup(
            self.parameters(), lr=self.lr, warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            betas=self.betas, weight_decay=self.weight_decay, warmup=self.warmup,
            optimizer=self.optimizer, fused=True,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Returns the facts that a reader needs to build the model of the trained tensors, with
        their kind."""
        raise NotImplementedError

    def adapter_metadata(self) -> dict[str, str]:
        """Returns the facts as JSON, for the header of an adapter file."""
        return {
            name: json.dumps(value)
            for name, value in {"schema": ADAPTER_SCHEMA, **self.facts()}.items()
        }

    def on_train_start(self) -> None:
        """Puts back this run's settings after a checkpoint brought its own learning rate, betas and
        weight decay; says what changes, in the schedule too."""
        for name, before in self._schedule_before.items():
            if (now := self.schedule().get(name, before)) != before:
                rank_zero_warn(
                    f"{name} {before} of the checkpoint is now {now}, as the settings say."
                )
        restored = self.trainer.optimizers[0].param_groups
        (config,) = self.trainer.lr_scheduler_configs
        scheduler: Any = config.scheduler  # LambdaLR
        scheduler.base_lrs = []
        for group, own, factor in zip(
            restored,
            self.configure_optimizers()["optimizer"].param_groups,
            scheduler.lr_lambdas,
            strict=True,
        ):
            changed = [
                name
                for name in ("initial_lr", "betas", "momentum", "weight_decay")
                if name in own and group.get(name) != own[name]
            ]
            for name in changed:
                rank_zero_warn(
                    f"{name} {group[name]} of the checkpoint is now {own[name]}, as the settings "
                    "say."
                )
                group[name] = own[name]
            scheduler.base_lrs.append(own["initial_lr"])
            # where the schedule, too, may be another
            group["lr"] = own["initial_lr"] * factor(scheduler.last_epoch)

    def schedule(self) -> dict[str, Any]:
        """Returns the settings of a step beside the optimizer's own."""
        trainer = self.trainer
        return {
            **{
                f"task.{name}": getattr(self, name)
                for name in ("warmup_steps", "decay_steps")
                if hasattr(self, name)
            },
            "trainer.max_steps": trainer.max_steps,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            "clips of a step": self._clips_of_a_step(),
        }

    def _clips_of_a_step(self) -> int | None:
        """Returns the clips of a step on all ranks; None where the data module does not say."""
        size = getattr(self.trainer.datamodule, "batch_size", None)  # pyright: ignore
        return size and size * reader(self.trainer)[1] * self.trainer.accumulate_grad_batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["schedule"] = self.schedule()
        trained = trainable_state(self)
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in trained
        }
        checkpoint["adapter_metadata"] = self.adapter_metadata()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError, before anything is loaded, for a checkpoint of another model, base or
        latents."""
        before, now = (
            # its hash says what it held
            {name: value for name, value in read_facts(facts).items() if name != "base"}
            for facts in (checkpoint["adapter_metadata"], self.adapter_metadata())
        )
        changed = [
            f"{name} {before.get(name)!r}, now {now[name]!r}"
            for name in now
            if before.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"This checkpoint was trained with {'; '.join(changed)}. Give the settings that it "
                "was trained with, or start anew without resume."
            )
        self._schedule_before = checkpoint.get("schedule", {})  # older ones have none
        load_trainable(self, checkpoint["state_dict"], "This checkpoint")
