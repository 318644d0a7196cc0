"""DoRA training on the shipped tiny DiT: real weights, real latent shards, real Trainer."""

import json
import math

import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from acetate import flow, regions
from acetate.draws import ClipDraws
from acetate.models.adapters import trainable_state
from acetate.models.dit import FrozenDiT
from acetate.tasks.dit import DoRATask
from tests.compose import composed

SMALL = [
    "data.batch_size=2",
    "data.num_workers=0",
    "data.val_clips=2",
    "task.rank=4",
    "task.alpha=4",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
]


class Record(Callback):
    def __init__(self):
        self.losses, self.keys = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.keys.append(tuple(batch["key"]))


def config_for(run, cached, *overrides):
    latents, adapters = cached
    samples = ["callbacks.samples=null"] if not any("samples" in o for o in overrides) else []
    return composed(
        run,
        "experiment=dit_dora",
        f"data.latents={latents}",
        f"rgba_vae={adapters}",
        f"wan.transformer={adapters.parent / 'base'}",
        *SMALL,
        *samples,
        *overrides,
    )


def fit(config, *, resume=None, logger=False, extra=()):
    record = Record()
    torch.manual_seed(config.seed)
    task, data = instantiate(config.task), instantiate(config.data)
    skipped = ("progress", "learning_rate")
    callbacks = [
        c
        for name, c in instantiate(config.callbacks).items()
        if name not in skipped and c is not None
    ]
    trainer = instantiate(config.trainer, callbacks=[*callbacks, record, *extra], logger=logger)
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return trainer, task, record


def test_logs_loss_by_timestep_and_fixed_validation(tmp_path, cached):
    trainer, _, _ = fit(
        config_for(tmp_path, cached, "trainer.max_steps=4", "trainer.log_every_n_steps=1")
    )
    names = set(trainer.callback_metrics)
    assert {"train/loss", "train/mse", "val/loss"} <= names
    assert len([name for name in names if name.startswith("val_t/")]) == 4


class Logged(CSVLogger):
    """What reaches a logger, as it came."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_loss_by_timestep_counts_every_clip_once(tmp_path, cached):
    logger = Logged(tmp_path)
    fit(
        config_for(tmp_path, cached, "trainer.max_steps=5", "trainer.log_every_n_steps=2"),
        logger=logger,
    )
    bins = [
        (step, row) for step, row in logger.rows if any(name.startswith("train_t/") for name in row)
    ]
    assert [step for step, _ in bins] == [2, 4]
    found = [len([name for name in row if name.startswith("train_t/")]) for _, row in bins]
    assert all(1 <= count <= 4 for count in found)  # of two steps with two clips each


def test_what_is_logged_is_of_the_whole_step(tmp_path, cached):
    """Beside the same batches as steps of their own, at weights that stay as they are."""
    still = ["task.lr=0", "trainer.log_every_n_steps=1", "callbacks.throughput=null"]
    logged = {}
    for name, more in (
        ("apart", ["trainer.max_steps=4"]),
        ("together", ["trainer.max_steps=2", "trainer.accumulate_grad_batches=2"]),
    ):
        logger = Logged(tmp_path)
        fit(config_for(tmp_path / name, cached, *still, *more), logger=logger)
        logged[name] = [(step, row) for step, row in logger.rows if "train/loss" in row]
    assert [step for step, _ in logged["apart"]] == [1, 2, 3, 4]
    assert [step for step, _ in logged["together"]] == [1, 2]
    for (_, row), (_, first), (_, second) in zip(
        logged["together"], logged["apart"][::2], logged["apart"][1::2], strict=True
    ):
        for name in ("train/loss", "train/mse"):
            assert row[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-6)
        assert row["epoch"] == second["epoch"]
        ranges = {name for part in (first, second) for name in part if name.startswith("train_t/")}
        assert {name for name in row if name.startswith("train_t/")} == ranges
        assert "lr-AdamW" in row


def test_resume_is_exact(tmp_path, cached):
    whole = fit(config_for(tmp_path / "a", cached, "trainer.max_steps=4"))
    fit(config_for(tmp_path / "b", cached, "trainer.max_steps=2", "task.decay_steps=4"))
    rest = fit(
        config_for(tmp_path / "b", cached, "trainer.max_steps=4"),
        resume=tmp_path / "b/checkpoints/last.ckpt",
    )
    assert rest[2].losses == whole[2].losses[2:]
    assert rest[2].keys == whole[2].keys[2:]
    for (name, a), b in zip(
        trainable_state(whole[1]).items(), trainable_state(rest[1]).values(), strict=True
    ):
        assert_close(a, b, rtol=0, atol=0, msg=name)


def test_levels_go_with_the_size_of_clips(tmp_path, cached):
    """A fourth of the cells: half the shift; every level as far from the picture as it says."""
    task = instantiate(
        config_for(tmp_path, cached, "task.noise.shift=6", "task.noise.shift_tokens=400").task
    )
    large, small = (task.levels_for(torch.zeros(2, 16, 1, side, side)) for side in (20, 10))
    u = 1 - 250 / 1000
    assert large.sigmas[250].item() == pytest.approx(6 * u / (1 + 5 * u))
    assert small.sigmas[250].item() == pytest.approx(3 * u / (1 + 2 * u))
    assert task.levels_for(torch.zeros(1, 16, 1, 10, 10)) is small
    default = instantiate(config_for(tmp_path, cached).task)
    assert torch.equal(default.levels_for(torch.zeros(1, 16, 3, 9, 9)).bits, flow.schedule().bits)


def test_levels_of_a_logit_normal():
    levels, keys = flow.schedule(shift=1.0), [f"clip{n}" for n in range(4000)]
    noise = flow.NoiseDraws(shift=1.0, density="logit_normal", mean=0.5, deviation=0.8)
    draws = (ClipDraws(keys, 0, "train", device=torch.device("cpu")) for _ in range(2))
    ids = noise.ids(levels, next(draws))
    logits = torch.logit(levels.sigmas[ids].clamp(1e-3, 1 - 1e-3))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logits.std().item() == pytest.approx(0.8, abs=0.05)
    assert torch.equal(noise.ids(levels, next(draws)), ids)
    assert torch.equal(flow.NoiseDraws(weighted=False).weights(levels, ids), torch.ones(4000))
    with pytest.raises(ValueError, match="density 'normal'; known: uniform, logit_normal"):
        flow.NoiseDraws(density="normal")


class Rates(Callback):
    """Learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_run_from_a_checkpoint_takes_its_own_settings(tmp_path, cached):
    """From the end of a cosine, where the rate was 0, into the middle of a longer one."""
    fit(config_for(tmp_path / "a", cached, "trainer.max_steps=2"))
    config = config_for(
        tmp_path / "b", cached, "trainer.max_steps=4", "task.lr=5e-5", "task.weight_decay=0.1"
    )
    rates = Rates()
    with pytest.warns(match="initial_lr 0.003 of the checkpoint is now 5e-05"):
        trainer, _, _ = fit(config, resume=tmp_path / "a/checkpoints/last.ckpt", extra=[rates])
    steps = torch.tensor([2, 3])
    expected = (
        5e-5
        * (steps + 1)
        / (config.task.warmup_steps + 1)
        * 0.5
        * (1 + torch.cos(math.pi * steps / 4))
    )
    assert_close(torch.tensor(rates.rates), expected)
    longer = config_for(
        tmp_path / "c", cached, "trainer.max_steps=3", "task.decay_steps=9", "task.warmup_steps=3"
    )
    with pytest.warns() as said:
        fit(longer, resume=tmp_path / "a/checkpoints/last.ckpt")
    for change in ("task.decay_steps 2", "task.warmup_steps 50", "trainer.max_steps 2"):
        assert any(f"{change} of the checkpoint is now" in str(one.message) for one in said), change
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1


def test_average_of_the_adapters_is_what_is_exported(tmp_path, cached):
    _, task, _ = fit(config_for(tmp_path, cached, "callbacks=ema", "trainer.max_steps=4"))
    saved = load_file(tmp_path / "checkpoints/last.safetensors")
    trained = trainable_state(task)
    assert saved.keys() == trained.keys()
    name = next(name for name in trained if ".lora_B." in name)
    assert not torch.equal(saved[name], trained[name])
    average = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["EMA"][
        "average"
    ]
    assert_close(saved[name], average[name], rtol=0, atol=0)


def test_checkpoints_hold_only_adapters(tmp_path, cached):
    trainer, task, _ = fit(config_for(tmp_path, cached, "trainer.max_steps=2"))
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == trainable_state(task).keys()
    assert all("lora_" in name for name in checkpoint["state_dict"])
    with safe_open(tmp_path / "checkpoints/last.safetensors", "pt") as file:
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
        assert set(file.keys()) == trainable_state(task).keys()
    assert facts["kind"] == "dit_dora"
    assert facts["vae_sha256"] == trainer.datamodule.manifest["vae_sha256"]
    assert facts["mean_shift"] == task.mean_shift


def test_other_latents_are_refused_on_resume(tmp_path, cached):
    fit(config_for(tmp_path, cached, "trainer.max_steps=2"))
    path = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["adapter_metadata"]["vae_sha256"] = '"other"'
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=r"checkpoint was trained with vae_sha256 'other', now '\w{64}'\. Give"
    ):
        fit(config_for(tmp_path, cached, "trainer.max_steps=4"), resume=path)


def ready(tmp_path, cached, *overrides):
    config = config_for(tmp_path, cached, "trainer.max_steps=1", *overrides)
    task, data = instantiate(config.task), instantiate(config.data)
    data.setup()
    task.configure_model()
    return task, next(iter(data.train_dataloader()))


def test_error_is_the_published_one(tmp_path, cached):
    """|DiT(x_t) - (noise~ - z)|^2 per clip, each at its own noise level, by hand."""
    task, batch = ready(tmp_path, cached)
    draws = ClipDraws(batch["key"], 0, "x", device=torch.device("cpu"))
    noise, ids = draws.normal(batch["latents"].shape[1:]), torch.tensor([30, 800])
    with torch.no_grad():
        ours = task.errors(batch, noise, ids, batch["context"])
        for i, step in enumerate(ids):
            z = batch["latents"][i : i + 1]
            guide = regions.gaussian(batch["ellipses"][i : i + 1], *z.shape[-2:])
            shifted = noise[i : i + 1] + task.mean_shift * (1 - guide)
            sigma = flow.schedule().sigmas[step]
            x_t = sigma * shifted + (1 - sigma) * z
            context = batch["context"][i : i + 1]
            v = task.transformer(x_t, 1000 * sigma[None], context, return_dict=False)[0]
            assert_close(ours[i], (v - (shifted - z)).square().mean(), rtol=1e-4, atol=1e-6)


def test_cells_count_by_coverage(tmp_path, cached):
    """An empty cell a tenth of a full one, and all of a clip 1 on average; floor 1 is no weight."""
    task, batch = ready(tmp_path, cached, "task.alpha_floor=0.1")
    covered = batch["coverage"]
    weights = task.cell_weights(batch)
    assert covered.min() == 0 and covered.max() > 0.1
    assert_close(weights.flatten(1).mean(1), torch.ones(2))
    for one, share in zip(weights, covered, strict=True):
        assert_close(one * (0.1 + 0.9 * share).mean(), 0.1 + 0.9 * share)
    noise = ClipDraws(batch["key"], 0, "x", device=torch.device("cpu")).normal(
        batch["latents"].shape[1:]
    )
    ids, context = torch.tensor([30, 800]), batch["context"]
    with torch.no_grad():
        plain = task.errors(batch, noise, ids, context)
        assert torch.equal(task.errors(batch, noise, ids, context, None, weights**0), plain)
        empty, seen = (
            task.errors(batch, noise, ids, context, None, part.float())
            for part in (covered == 0, covered > 0)
        )
        ours = task.errors(batch, noise, ids, context, None, weights)
    assert_close(empty + seen, plain)
    lifted = (ours - empty * weights.flatten(1).amin(1)) / seen  # of what is seen
    assert (lifted > 1).all()
    del batch["coverage"]
    assert instantiate(config_for(tmp_path, cached).task).cell_weights(batch) is None
    with pytest.raises(ValueError, match=r"alpha_floor=0\.1 .* cache is older\. Cache them anew"):
        task.errors(batch, noise, ids, context)


def test_captions_are_dropped_for_a_share_of_the_clips():
    with pytest.raises(ValueError, match="caption_dropout 2; a share"):
        DoRATask(
            base=FrozenDiT("nowhere", "float32"), rank=4, alpha=4, checkpointing=False,
            mean_shift=0.05, caption_dropout=2, lr=1e-3, warmup_steps=0, decay_steps=None,
            betas=(0.9, 0.99), weight_decay=0.0, seed=0,
        )  # fmt: skip


def test_latents_of_another_shape_are_refused(tmp_path, cached):
    task, batch = ready(tmp_path, cached)
    with pytest.raises(ValueError, match="reads 16 latent channels, the cached samples have 8"):
        task.errors(
            {**batch, "latents": batch["latents"][:, :8]},
            batch["latents"],
            torch.tensor([1, 2]),
            None,
        )


@pytest.mark.slow
@pytest.mark.long
def test_overfits_eight_clips(tmp_path, cached):
    """The loss at the validation timesteps falls below a sixteenth of its start, which is high
    without the base's other blocks."""
    config = config_for(
        tmp_path,
        cached,
        "trainer.max_steps=1",
        "data.batch_size=8",
        "task.rank=32",
        "task.alpha=32",
    )
    task, data = instantiate(config.task), instantiate(config.data)
    data.setup()
    task.configure_model()
    batch = next(iter(data.train_dataloader()))
    ids = torch.tensor([*task.val_ids.values()]).repeat(2)
    noise = ClipDraws(batch["key"], 0, "val", device=torch.device("cpu")).normal(
        batch["latents"].shape[1:]
    )
    parameters = list(trainable_state(task).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0)
    steps, losses = 200, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-2 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        optimizer.zero_grad()
        loss = task.errors(batch, noise, ids, batch["context"]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 16
