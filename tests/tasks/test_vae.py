"""The RGBA-VAE task on the shipped tiny base: real weights, real shards, real Trainer."""

import json

import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback
from safetensors import safe_open
from torch.testing import assert_close

from acetate.models.adapters import trainable_state
from tests.compose import composed

SMALL = [
    "data.frames=5",
    "data.height=16",
    "data.width=16",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.val_clips=3",
    "data.val_batch_size=2",
    "model.lora_rank=2",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
]


class Record(Callback):
    """Losses and clip keys of every training step."""

    def __init__(self):
        self.losses, self.keys = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.keys.append(tuple(batch["key"]))


def config_for(run, shards, *overrides):
    return composed(run, "experiment=vae_rgba", f"data.shards={shards}", *SMALL, *overrides)


def fit(config, *, resume=None, logger=False, extra=()):
    """Trainer, task and record after `train.py`'s own steps."""
    record = Record()
    torch.manual_seed(config.seed)
    task, data = instantiate(config.task), instantiate(config.data)
    callbacks = [
        c
        for name, c in instantiate(config.callbacks).items()
        if name not in ("progress", "learning_rate")
    ]
    trainer = instantiate(config.trainer, callbacks=[*callbacks, record, *extra], logger=logger)
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return trainer, task, record


def test_training_logs_every_part_and_validation_is_deterministic(tmp_path, shards):
    trainer, task, _ = fit(
        config_for(tmp_path, shards, "trainer.max_steps=2", "trainer.log_every_n_steps=1")
    )
    names = set(trainer.callback_metrics)
    views = {f"{stage}/{view}/{term}" for stage in ("train", "val") for view in ("alpha", "soft",
        "hard")
             for term in ("l1", "perceptual", "edge")}  # fmt: skip
    assert views <= names
    assert {"train/diffusion", "val/diffusion", "latents/mean", "z/std_00"} <= names
    assert {"val/rgb/psnr", "val/rgb/ssim", "val/alpha/mae", "val/alpha/mae_of_mean"} <= names
    data = instantiate(config_for(tmp_path, shards, "trainer.max_steps=2").data)
    first, second = (trainer.validate(task, data, verbose=False)[0] for _ in range(2))
    assert first == second


def test_one_clip_draws_the_same_in_any_batch(tmp_path, shards):
    task = instantiate(config_for(tmp_path, shards, "trainer.max_steps=1").task)
    task.configure_model()
    batch = {"alpha": torch.rand(3, 1, 5, 16, 16), "key": ["a", "b", "c"]}
    whole = task.draw(batch, "train", 7)
    alone = task.draw({"alpha": batch["alpha"][:1], "key": ["b"]}, "train", 7)
    for together, single in zip(whole, alone, strict=True):
        assert_close(together[1:2], single)
    assert not torch.equal(whole.noise, task.draw(batch, "train", 8).noise)
    per_batch = instantiate(
        config_for(tmp_path, shards, "trainer.max_steps=1", "task.background_per=batch").task
    )
    per_batch.configure_model()
    colors = per_batch.draw({**batch, "key": [str(i) for i in range(3)]}, "train", 1).soft
    assert_close(colors, colors[:1].expand_as(colors))


@pytest.mark.slow
@pytest.mark.long
def test_resume_is_exact(tmp_path, shards):
    """Four steps, then four more from the checkpoint, are the eight of one run: losses, clips,
    weights."""
    steps = "trainer.max_steps={}"
    overrides = [
        "task.decay_steps=null",
        "callbacks=ema",
        "callbacks.checkpoint.every_n_train_steps=4",
    ]
    _, whole, expected = fit(config_for(tmp_path / "a", shards, steps.format(8), *overrides))
    fit(config_for(tmp_path / "b", shards, steps.format(4), *overrides))
    resume = str(tmp_path / "b/checkpoints/last.ckpt")
    _, resumed, record = fit(
        config_for(tmp_path / "c", shards, steps.format(8), *overrides), resume=resume
    )
    assert record.keys == expected.keys[4:]
    assert record.losses == expected.losses[4:]
    for name, value in trainable_state(whole).items():
        assert_close(trainable_state(resumed)[name], value, rtol=0, atol=0)


def test_checkpoint_holds_only_what_trains(tmp_path, shards):
    _, task, _ = fit(config_for(tmp_path, shards, "trainer.max_steps=2"))
    path = tmp_path / "checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == set(trainable_state(task))
    assert not any("original" in name or "encoder" in name or "judge" in name for name in state)
    with safe_open(path.with_name("00000002.safetensors"), "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        assert set(file.keys()) == set(state)
    assert metadata["base_sha256"] == task.vae.base_sha256
    assert (metadata["lora_rank"], metadata["merge_init"]) == (2, "residual")


def test_checkpoint_of_another_model_is_refused(tmp_path, shards):
    """Also where names and shapes are the same."""
    fit(config_for(tmp_path, shards, "trainer.max_steps=2", "model.lora_alpha=16"))
    other = ["model.lora_rank=2", "model.lora_alpha=99", "model.merge_init=scratch"]
    with pytest.raises(
        ValueError, match=r"merge_init 'residual', now 'scratch'; lora_alpha 16, now 99\. Give"
    ):
        fit(
            config_for(tmp_path / "b", shards, "trainer.max_steps=4", *other),
            resume=str(tmp_path / "checkpoints/last.ckpt"),
        )


def test_a_clip_that_the_models_cannot_take_is_refused(tmp_path, shards):
    task = instantiate(config_for(tmp_path, shards).task)
    task.configure_model()
    for frames, height, width, message in (
        (5, 18, 16, "height 18; this VAE needs multiples of 4. Use height=16"),
        (5, 16, 20, "width 20; the DiT needs multiples of 8 pixels"),
        (7, 16, 16, r"7 frames; this VAE needs 4k\+1 frames .*Use frames=5"),
    ):
        with pytest.raises(ValueError, match=message):
            task.check_shape(torch.ones(1, 1, frames, height, width))


def test_training_refuses_such_a_clip(tmp_path, shards):
    with pytest.raises(ValueError, match="width 20; the DiT needs multiples of 8 pixels"):
        fit(config_for(tmp_path, shards, "data.width=20", "data.space_multiple=1"))


def test_without_a_judge_no_dit_is_loaded(tmp_path, shards):
    overrides = ["loss.diffusion.mode=off", "wan.transformer=/nowhere", "trainer.max_steps=1"]
    _, task, _ = fit(config_for(tmp_path, shards, *overrides))
    assert task.judge is None


def test_moment_penalty_pulls_latents_to_the_base(tmp_path, shards):
    task = instantiate(
        config_for(tmp_path, shards, "trainer.max_steps=1", "task.moment_weight=1.0").task
    )
    task.configure_model()
    batch = {
        "rgb": torch.zeros(1, 3, 5, 16, 16),
        "alpha": torch.ones(1, 1, 5, 16, 16),
        "key": ["a"],
    }
    _, parts, *_, latents = task.step(batch, task.draw(batch, "train", 0))
    mean, variance = latents.mean((0, 2, 3, 4)), latents.var((0, 2, 3, 4))
    assert_close(parts["moments"], (mean**2 + (variance - 1) ** 2).mean())


@torch.no_grad()
def test_validation_is_the_same_for_any_batches(tmp_path, shards):
    more = ["trainer.max_steps=1", "task.moment_weight=1.0", "loss.diffusion.mode=bidirectional"]
    task = instantiate(config_for(tmp_path, shards, *more).task)
    task.configure_model()
    alpha = torch.zeros(3, 1, 5, 16, 16)
    alpha[0] = alpha[1, ..., :8] = 1  # all, half and none of the cells are opaque
    batch = {"rgb": torch.rand(3, 3, 5, 16, 16) * 2 - 1, "alpha": alpha, "key": ["a", "b", "c"]}
    loss, parts, *_ = task.step(batch, task.draw(batch, "val", 0))
    each = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(3)]
    losses, of_each, *_ = zip(
        *(task.step(clip, task.draw(clip, "val", 0)) for clip in each), strict=True
    )
    assert_close(loss, torch.stack(losses).mean())
    for name, value in parts.items():
        assert_close(value, torch.stack([parts[name] for parts in of_each]).mean())


class Poison(Callback):
    """NaN in a weight before step 1."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            next(iter(trainable_state(pl_module).values())).data.fill_(float("nan"))


def test_non_finite_loss_names_step_and_clips(tmp_path, shards):
    config = config_for(tmp_path, shards, "trainer.max_steps=3")
    with pytest.raises(
        FloatingPointError, match=r"training step 1, clips \w+-\d+, \w+-\d+: not finite: loss"
    ):
        fit(config, extra=[Poison()])
