import gc
import importlib
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch.profiler import ProfilerActivity, profile

from acetate import memory
from acetate.blank import BLANK, blank_transformer, blank_vae
from acetate.callbacks.ema import EMA
from acetate.commands.estimate import footprint
from acetate.cuda_autocast import cuda_autocast
from acetate.models.loading import load_transformer, load_vae
from acetate.models.wan import Geometry
from tests.compose import composed

MIB = 2**20
FOOTPRINT = memory.Footprint(
    parameters=30, trainable_parameters=10, frozen=800, trainable=160, gradients=160, optimizer=320,
    ema=160,
    activations=1000, working=50, replicated=80, gathered=300, groups=3, flops=7,
)  # fmt: skip


def test_sharding_divides_all_but_what_a_clip_needs():
    one, eight = FOOTPRINT.per_gpu(1), FOOTPRINT.per_gpu(8)
    assert one["total"] == 800 + 160 + 160 + 320 + 160 + 1000 + 50
    assert eight["total"] == 80 + 90 + 20 + 20 + 40 + 20 + 300 + 1000 + 50
    assert (one["gathered weights"], eight["gathered weights"]) == (0, 300)


def test_a_card_keeps_a_reserve():
    assert memory.room(80) == pytest.approx(72 * 2**30)


def test_storages_count_once_and_until_they_are_freed():
    known = torch.zeros(MIB)
    with memory.LiveStorages([known]) as storages:
        view = known[:10].t()
        first = torch.zeros(MIB)
        assert storages.live == first.nbytes
        second = first.view(-1, 2) + 1
        assert storages.live == 2 * first.nbytes
        del second
        third = torch.zeros(10)
        assert storages.live == first.nbytes + third.nbytes
        known.add_(1)
        view.add_(1)
    assert storages.peak == 2 * first.nbytes


def test_without_numbers_keeps_shapes_precision_and_ties():
    module = nn.ModuleDict(
        {"a": nn.Linear(3, 3).half(), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)}
    )
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    facts = {name: (p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()}
    with memory.FakeTensorMode(allow_non_fake_inputs=True):
        memory.without_numbers(module)
        assert {
            name: (p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()
        } == facts
    assert module["a"].weight is module["b"].weight


def test_blank_models_have_the_shapes_of_loaded_ones(wan_folder):
    source = str(wan_folder)
    for blank, loaded in (
        (blank_vae(source), load_vae(source)),
        (
            blank_transformer(source, torch.bfloat16),
            load_transformer(source, torch.bfloat16),
        ),
    ):
        shapes = [
            {name: (p.shape, p.dtype) for name, p in model.state_dict().items()}
            for model in (blank, loaded)
        ]
        assert shapes[0] == shapes[1]
        assert all(p.is_meta and not p.requires_grad for p in blank.parameters())


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14_288_491_584),
        ("/models/Wan2.1-T2V-14B", 14_288_491_584),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 14_288_491_584),  # of each expert
    ],
)
def test_wan21_is_known_without_its_files(source, parameters):
    transformer = blank_transformer(source, torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    assert sum(p.numel() for p in blank_vae(source).parameters()) == 126_892_531
    assert Geometry.of(blank_vae(source)).latent_shape(81, 480, 832) == (16, 21, 60, 104)


def test_an_unknown_base_is_named():
    with pytest.raises(ValueError, match="someone/else: the shape of this DiT is not known"):
        blank_transformer("someone/else", torch.float32)


def test_blank_targets_exist():
    for target, blank in BLANK.items():
        for name in (target, blank):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute)


def test_blocks_are_gathered_two_at_a_time():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(10, 1, bias=False)
            self.blocks = nn.ModuleList(
                [nn.Linear(size, 1, bias=False) for size in (100, 300, 200)]
            )
            self.again = self.blocks

    model = Model()
    assert memory._gathered(model, list(model.blocks)) == 4 * (10 + 300 + 200)
    assert memory._gathered(model, []) == 4 * (10 + 600)


def test_unknown_precision_is_named():
    load = memory.Load(batch_size=1, frames=1, height=8, width=8, prompt_length=4)
    with pytest.raises(ValueError, match="64-true"):
        memory.measure(nn.Linear(1, 1), load, precision="64-true", ema=False)  # type: ignore[arg-type]


def allocated(config) -> int:
    """Most bytes that PyTorch's CPU allocator had given out at once during two training steps of
    the real run."""
    gc.collect()  # what earlier tests left would be freed, and counted, within
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = instantiate(
            config.trainer, callbacks=[EMA(0.9)], logger=False, limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, max_steps=2, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(instantiate(config.task), instantiate(config.data))
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            live += event.nbytes()  # negative where memory is freed
            peak = max(peak, live)
    return peak


def compare(tmp_path: Path, *overrides: str, precision: str = "32-true") -> None:
    config = composed(
        tmp_path,
        f"trainer.precision={precision}",
        "data.num_workers=0",
        "+callbacks.ema.decay=0.9",
        *overrides,
    )
    with cuda_autocast():  # the precisions of a GPU, which are estimated
        real = allocated(config)
    assert footprint(config)[1].per_gpu(1)["total"] == pytest.approx(real, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_vae_stage_against_a_real_run(checkpointing, tmp_path, shards):
    clip = ["data.frames=9", "data.height=32", "data.width=32", "data.batch_size=2"]
    place = [f"data.shards={shards}", f"model.checkpointing={checkpointing}"]
    compare(tmp_path, "experiment=vae_rgba", *place, *clip)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dit_stage_against_a_real_run(checkpointing, tmp_path, cached):
    clip = ["wan.frames=5", "wan.height=24", "wan.width=24", "data.batch_size=8"]
    place = [f"data.latents={cached[0]}", f"task.checkpointing={checkpointing}"]
    compare(tmp_path, "experiment=dit_dora", *place, *clip)


@pytest.mark.slow
def test_autocast_against_a_real_run(tmp_path, cached):
    clip = [
        "wan.frames=5",
        "wan.height=24",
        "wan.width=24",
        "data.batch_size=8",
        f"data.latents={cached[0]}",
    ]
    compare(tmp_path, "experiment=dit_dora", *clip, "wan.dtype=bfloat16", precision="bf16-mixed")


@pytest.mark.slow
def test_base_stage_against_a_real_run(tmp_path):
    compare(
        tmp_path, "experiment=wan_tiny_vae", "data.height=32", "data.width=32", "data.batch_size=2"
    )
