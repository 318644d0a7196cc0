"""The same numbers on any number of ranks: gloo on the CPU, fp32, the shipped base."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from acetate.data.latent_shards import index_latents
from acetate.data.shards import index_shards, read_manifest
from acetate.formats.checkpoints import read_trained
from data_prep.synthesize import synthesize
from tests.conftest import cache_demo
from tests.distributed import runs
from tests.processes import launch

STEPS, MIDDLE = 6, 3
COMMON = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={MIDDLE}",
    "callbacks.checkpoint.save_top_k=-1",
          "trainer.log_every_n_steps=2", "data.val_batch_size=1", "data.val_clips=4",
          "callbacks.ema.decay=0.5", "callbacks.curves=null"]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.xdist_group("ranks"),
    pytest.mark.timeout(1800),  # fourteen trainings, half of them of four ranks
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    out = tmp_path_factory.mktemp("clips") / "demo"
    synthesize(
        out=out, clips=20, frames=5, sizes=[24], seed=0, val_fraction=0.5, max_clips=100,
        max_bytes=10**9
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def stages(clips, tmp_path_factory):
    latents, adapters = cache_demo(clips, tmp_path_factory.mktemp("cached"))
    common = [*COMMON, f"wan.transformer={adapters.parent / 'base'}"]
    return {
        "vae": [
            "experiment=vae_rgba", "callbacks=ema", "callbacks.panels=null", f"data.shards={clips}",
            "data.frames=5",
            "data.height=16", "data.width=16", "loss.diffusion.mode=bidirectional",
            "model.lora_rank=4",
            "task.moment_weight=0.1", *common,
        ],
        "dit": [
            "experiment=dit_dora", "callbacks=ema", f"data.latents={latents}",
            f"rgba_vae={adapters}",
            "task.checkpointing=true", "task.rank=4", "callbacks.samples.frames=5",
            "callbacks.samples.height=24",
            "callbacks.samples.width=24", "callbacks.samples.prompts=[a star,blue smoke,a ring]",
            "callbacks.samples.solver.steps=1", "callbacks.samples.every_n_validations=2",
            *common,
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(stages, tmp_path_factory):
    """(stage, kind of run) -> losses, validation and held bytes of rank 0; and the folder of each
    run."""
    root = tmp_path_factory.mktemp("ranks")
    folders = {
        (stage, kind): root / f"{stage}_{kind}"
        for stage in stages
        for kind in ("one", "ddp", "fsdp", "fsdp4", "on1", "on4", "file4")
    }
    results = {}

    def run(world, kinds):
        arguments = {}
        for stage, overrides in stages.items():
            for kind, trainer in kinds.items():
                source = "one" if kind == "file4" else "fsdp"
                middle = folders[stage, source] / f"checkpoints/{MIDDLE:08d}.ckpt"
                resume = middle if kind in ("on1", "on4", "file4") else None
                unread = ["callbacks.checkpoint=null"] * (kind in ("fsdp4", "on1", "file4"))
                if resume and stage == "dit":
                    unread += ["callbacks.samples=null"]
                settings = [*overrides, *unread]
                arguments[stage, kind] = (folders[stage, kind], trainer, settings, resume)
        results.update(launch(world, runs.fits, arguments)[0])

    run(2, {"ddp": "ddp", "fsdp": "fsdp"})
    run(1, {"one": "default", "on1": "default"})
    run(4, {"fsdp4": "fsdp", "on4": "fsdp", "file4": "fsdp"})
    return results, folders


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_losses_are_those_of_one_process(found, stage):
    results, _ = found
    one = results[stage, "one"]
    assert len(one["losses"]) == STEPS
    assert one["losses"][0] != one["losses"][-1]
    for kind in ("ddp", "fsdp", "fsdp4"):
        assert_close(results[stage, kind]["losses"], one["losses"], rtol=1e-6, atol=1e-6)
        assert_close(results[stage, kind]["metrics"], one["metrics"], rtol=1e-5, atol=1e-5)
        assert_close(results[stage, kind]["logged"], one["logged"], rtol=1e-4, atol=1e-5)
    held = [results[stage, kind]["held"] for kind in ("ddp", "fsdp", "fsdp4")]
    assert held[2] < 0.7 * held[1] < 0.7 * 0.7 * held[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp4"])
def test_samples_that_ranks_share_are_those_of_one(found, kind):
    """Three of them: two and four ranks have one too few or too many."""
    _, folders = found
    sheets = [
        np.asarray(Image.open(folders["dit", one] / f"samples/step_{STEPS:08d}/sheet.png"))
        for one in ("one", kind)
    ]
    assert sheets[0].shape == sheets[1].shape
    # of 8 bits where ranks hand them over
    assert np.abs(sheets[0].astype(int) - sheets[1]).max() <= 3


@pytest.mark.parametrize("stage", ["vae", "dit"])
@pytest.mark.parametrize("kind", ["on1", "on4", "file4"])
def test_checkpoints_go_on_on_other_ranks(found, stage, kind):
    results, _ = found
    one, resumed = results[stage, "one"], results[stage, kind]
    assert_close(resumed["losses"], one["losses"][MIDDLE:], rtol=1e-6, atol=1e-6)
    assert_close(resumed["metrics"], one["metrics"], rtol=1e-5, atol=1e-5)  # of the average


@pytest.mark.parametrize("stage", ["vae", "dit"])
@pytest.mark.parametrize("ema", [True, False])
def test_a_sharded_checkpoint_exports_as_a_whole_one(found, stage, ema):
    _, folders = found
    whole, sharded = (read_trained(str(folders[stage, kind]), ema) for kind in ("one", "fsdp"))
    assert whole.path.is_file()
    assert sharded.path.is_dir()
    assert whole.facts == sharded.facts
    # AdamW divides by the size of gradients, so where they are no more than rounding, weights
    # differ by a share of lr
    assert_close(sharded.state, whole.state, rtol=1e-4, atol=1e-4)
    if ema:
        beside = read_trained(str(sharded.path.with_suffix(".safetensors")))
        assert_close(beside.state, sharded.state, rtol=0, atol=0)


def test_ddp_trains_on_stills(stages, tmp_path):
    """Whose decoders leave out their convolutions over time."""
    settings = [*stages["vae"], "data.frames=1", "trainer.max_steps=2", "callbacks.checkpoint=null"]
    one = launch(1, runs.fit, tmp_path / "one", "default", settings)[0]
    two = launch(2, runs.fit, tmp_path / "two", "ddp", settings)[0]
    assert_close(two["losses"], one["losses"], rtol=1e-6, atol=1e-6)


def test_ddp_trains_on_held_weights(stages, tmp_path):
    """Which every rank has rounded by itself and holds in its own memory."""
    settings = [
        *stages["dit"], "task.base.weights=fp8", "task.base.offload=true", "trainer.max_steps=2",
        "callbacks.checkpoint=null", "callbacks.samples=null",
    ]  # fmt: skip
    one = launch(1, runs.fit, tmp_path / "one", "default", settings)[0]
    two = launch(2, runs.fit, tmp_path / "two", "ddp", settings)[0]
    assert_close(two["losses"], one["losses"], rtol=1e-6, atol=1e-6)


def test_colour_and_alpha_in_one_sequence_train_on_many_ranks(cached_joint, tmp_path):
    settings = [
        "experiment=dit_joint", f"data.latents={cached_joint}", "task.rank=4",
        "trainer.max_steps=3", "trainer.log_every_n_steps=1", "+trainer.limit_val_batches=0",
        "callbacks.checkpoint=null", "callbacks.samples=null",
    ]  # fmt: skip
    one = launch(1, runs.fit, tmp_path / "one", "default", settings)[0]
    arguments = {kind: (tmp_path / kind, kind, settings) for kind in ("ddp", "fsdp")}
    two = launch(2, runs.fits, arguments)[0]
    assert one["losses"][0] != one["losses"][-1]
    for kind in arguments:
        assert_close(two[kind]["losses"], one["losses"], rtol=1e-6, atol=1e-6)
    assert two["fsdp"]["held"] < 0.7 * one["held"]


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_bad_clips_weigh_nothing(stages, clips, tmp_path, stage):
    """On one process they leave a batch of four, on four a rank has no other clip."""
    data = {"vae": clips, "dit": clips_of(stages["dit"])}[stage]
    copy = shutil.copytree(data, tmp_path / "data")
    refs = (
        index_shards([copy])
        if stage == "vae"
        else index_latents(copy, read_manifest(copy, "latents"))
    )
    bad = next(ref for ref in refs if ref.split == "train")
    with open(bad.tar, "r+b") as file:
        file.seek(bad.media[0] + bad.media[1] // 2)
        file.write(bytes(8))
    place = {"vae": "data.shards", "dit": "data.latents"}[stage]
    settings = [
        *stages[stage], f"{place}={copy}", "trainer.max_steps=6", "data.bad_clip_budget=3",
        "callbacks.checkpoint=null",
        *{"vae": ["loss.diffusion.mode=off", "task.moment_weight=0"],
          "dit": ["callbacks.samples=null"]}[stage],
    ]  # fmt: skip
    one = launch(1, runs.fit, tmp_path / "one", "default", settings)[0]
    four = launch(4, runs.fit, tmp_path / "four", "fsdp", settings)[0]
    assert_close(four["losses"], one["losses"], rtol=1e-6, atol=1e-6)
    assert_close(four["logged"], one["logged"], rtol=1e-4, atol=1e-5)


def clips_of(overrides):
    return next(value.partition("=")[2] for value in overrides if value.startswith("data.latents="))


@pytest.mark.parametrize("world", [2, 4])
def test_every_clip_once_an_epoch(tmp_path, world):
    """Of as many tars as ranks have workers, and of one more."""
    folders = []
    for tars in (2 * world, 2 * world + 1):
        folder = tmp_path / f"of_{tars}"
        synthesize(
            out=folder, clips=2 * tars + 4, frames=5, sizes=[16], seed=0, val_fraction=0.5,
            max_clips=2, max_bytes=10**9
        )  # fmt: skip
        folders.append(folder)
    batches, batch_size = 9, 2
    ranks = launch(world, runs.keys, folders, 2, batches, batch_size)
    for parts in zip(*ranks, strict=True):
        trained, validated = zip(*parts, strict=True)
        order = [
            key
            for batch in zip(*trained, strict=True)
            for place in zip(*batch, strict=True)
            for key in place
        ]
        count = len(set(order))
        assert len(order) == world * batches * batch_size
        for start in range(0, len(order) // count * count, count):
            assert len(set(order[start : start + count])) == count
        assert set(Counter(key for keys in validated for key in keys).values()) == {1}


def test_uneven_validation_of_a_sharded_model_is_refused(stages, tmp_path):
    for said in launch(2, runs.refused, tmp_path, "fsdp", [*stages["vae"], "data.val_clips=3"]):
        assert (
            "unequal numbers of batches on 2 ranks, 1 to 2; a sharded model needs equal ones"
            in said
        )
        assert "val_clips" in said


def test_no_rank_holds_a_whole_model(tmp_path):
    """One of 330 MB in fp32: two ranks take about half of it each, read from its file."""
    with init_empty_weights():
        model = WanTransformer3DModel(
            num_attention_heads=8, attention_head_dim=64, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64,
            ffn_dim=2048, num_layers=19, rope_max_seq_len=64,
        )  # fmt: skip
    model.save_config(tmp_path / "transformer")
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: torch.zeros(value.shape) for name, value in model.state_dict().items()}, file)
    whole = file.stat().st_size
    assert whole > 320e6
    for peak in launch(2, runs.peak_of_loading, tmp_path):
        assert 0.5 < peak / whole < 0.7


def test_a_full_disk_leaves_the_previous_shards(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for said, files, step in launch(2, runs.full_disk, folder):
        assert "last.ckpt could not be written" in said
        assert "resume=last" in said
        assert (files, step) == (["last.ckpt"], 1)


def test_a_checkpoint_that_is_not_whole_is_refused_by_all_ranks(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    for apart, other in launch(2, runs.unwritten, tmp_path):
        assert (
            "no __1_0.distcp, which another rank has written: all machines must share the folder"
            in apart
        )
        assert "last.ckpt could not be written" in other and "lambda" in other
    assert not list(tmp_path.glob("**/last.ckpt"))
