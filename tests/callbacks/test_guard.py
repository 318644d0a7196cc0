from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.data import DataLoader

from acetate.callbacks.guard import NonFiniteGuard
from tests.processes import launch


class Task(LightningModule):
    """Loss |weight| * mean(rgb) + mean(alpha) * 0; what `poison` returns is added at its
    batches."""

    fused = False

    def __init__(self, poison: Any = None, at: tuple[int, ...] = ()):
        super().__init__()
        self.weight, self.frozen = (
            nn.Parameter(torch.ones(2)),
            nn.Parameter(torch.ones(2), requires_grad=False),
        )
        self.poison, self.at = poison, at
        self.history: list[Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        self.history.append(self.weight.detach().clone())
        parts = {
            "alpha/l1": (self.weight.abs() * batch["rgb"].mean()).sum(),
            "soft/edge": 0 * batch["alpha"].mean(),
        }
        if batch_idx in self.at:
            parts["soft/edge"] = parts["soft/edge"] + self.poison(self.weight)
        return {"loss": sum(parts.values()), "parts": parts}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "fused"])
def fused(request, monkeypatch):
    """A fused optimizer skips by itself, and the guard speaks a step later."""
    monkeypatch.setattr(Task, "fused", request.param)
    return request.param


def clips(count: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "rgb": torch.ones(3, 1, 2, 2),
            "alpha": torch.ones(1, 1, 2, 2),
            "prompt": "",
            "key": f"clip{i}",
        }
        for i in range(count)
    ]


def fit(
    task: LightningModule,
    guard: NonFiniteGuard,
    data: list[dict[str, Any]] | None = None,
    **trainer: Any,
) -> None:
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[guard],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).fit(task, DataLoader(data or clips(), batch_size=2))  # type: ignore[arg-type]


def infinite(weight: Tensor) -> Tensor:
    return weight.sum() * torch.inf


def nan_gradient(weight: Tensor) -> Tensor:
    return torch.sqrt((weight * 0).sum()) * 0  # value 0, gradient 0 * inf


def test_finite_training_runs():
    task = Task()
    fit(task, NonFiniteGuard(), gradient_clip_val=1.0)
    assert len(task.history) == 4


def test_loss_names_step_clips_parts_and_way_out():
    with pytest.raises(FloatingPointError) as error:
        fit(Task(infinite, at=(2,)), NonFiniteGuard())
    text = str(error.value)
    for part in (
        "training step 2",
        "clips clip4, clip5",
        "soft/edge = inf",
        "loss = inf",
        "patience=1",
    ):
        assert part in text
    assert "alpha/l1" not in text


def test_gradient_names_the_parameter_and_spares_the_weights():
    task = Task(nan_gradient, at=(1,))
    with pytest.raises(FloatingPointError, match=r"training step 1, .* gradient of weight"):
        fit(task, NonFiniteGuard())
    assert_close(task.weight.detach(), task.history[1])


def test_large_finite_gradients_pass():
    # their Euclidean norm overflows float32
    task = Task(lambda weight: weight.sum() * 1e30, at=(0, 1))
    fit(task, NonFiniteGuard())
    assert len(task.history) == 4


@pytest.mark.parametrize("name", ["rgb", "alpha"])
def test_input_names_the_clip(name: str):
    data = clips()
    data[3][name] = data[3][name].clone()
    data[3][name][0, 0, 0, 0] = torch.nan
    task = Task()
    with pytest.raises(
        FloatingPointError, match=rf"training step 1, .*{name} of clip clip3 holds NaN"
    ):
        fit(task, NonFiniteGuard(), data)
    assert_close(task.weight.detach(), task.history[1])


@pytest.mark.parametrize("poison", [infinite, nan_gradient])
def test_patience_skips_and_goes_on(poison: Any):
    task = Task(poison, at=(1,))
    with pytest.warns(UserWarning, match="training step 1, .* Skipped, 1 of at most 1 in a row"):
        fit(task, NonFiniteGuard(patience=1))
    first, second, after, last = task.history
    assert (first != second).all()
    assert_close(second, after)  # AdamW's weight decay did not act either
    assert (after != last).all()


def test_patience_counts_steps_in_a_row():
    with pytest.warns(UserWarning, match="Skipped"):
        fit(Task(infinite, at=(0, 2)), NonFiniteGuard(patience=1))
    with (
        pytest.warns(UserWarning, match="Skipped"),
        pytest.raises(FloatingPointError, match="step 2"),
    ):
        fit(Task(infinite, at=(1, 2)), NonFiniteGuard(patience=1))


def test_accumulated_batches_name_their_own_clips():
    with pytest.raises(FloatingPointError, match=r"clips clip0, clip1: .*loss = inf"):
        fit(Task(infinite, at=(0,)), NonFiniteGuard(), accumulate_grad_batches=2)


def test_accumulated_gradients_of_a_bad_batch_are_dropped():
    task = Task(infinite, at=(0,))
    with pytest.warns(UserWarning, match="clips clip0, clip1"):
        fit(task, NonFiniteGuard(patience=1), accumulate_grad_batches=2)
    assert task.weight.isfinite().all()
    assert (task.history[2] != task.history[0]).all()  # the good second half still made a step


def test_negative_patience_is_refused():
    with pytest.raises(ValueError, match="patience=-1"):
        NonFiniteGuard(patience=-1)


class Sharded(LightningModule):
    """A weight whose first rows live on rank 0; at batches 1, 3, 4 only the gradient of row 0 is
    NaN."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        self.net = nn.Linear(4, 4, bias=False)

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        out = self.net(batch["alpha"].flatten(1))
        if batch_idx in (1, 3, 4):
            out = out + nan_gradient(out[:, 0])
        return {"loss": out.mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)


def said_by_sharded(fused: bool) -> tuple[str, bool, float]:
    """What the guard raises on this rank, whether every weight is finite then, and the optimizer's
    steps."""
    task = Sharded(fused)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with pytest.raises(FloatingPointError) as error:
        fit(task, NonFiniteGuard(patience=1), clips(20), devices=2, strategy=strategy)
    finite = bool(task.net.weight.full_tensor().isfinite().all())  # type: ignore[operator]
    (state,) = task.optimizers(use_pl_optimizer=False).state.values()  # type: ignore[union-attr]
    return str(error.value), finite, float(state["step"])


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.long
def test_ranks_of_a_sharded_model_skip_and_raise_together(fused):
    (first, *first_left), (second, *second_left) = launch(2, said_by_sharded, fused)
    assert "training step 4" in first
    assert "gradient of net.weight" in first
    assert "training step 4" in second
    assert "nothing on this rank; another rank names the cause" in second
    assert first_left == second_left == [True, 2]
