"""Ranks that share a clip give the loss and the gradients of one process: gloo on the CPU, fp32."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from torch.testing import assert_close

from data_prep.synthesize import synthesize
from tests.conftest import cache_demo
from tests.distributed import runs
from tests.processes import launch

NARROW = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
# 48 tokens, which two and four ranks divide, and 45, which they do not: the last parts are filled
CLIPS = {"even": (4, 3, 8, 8), "odd": (4, 5, 6, 6), "fewer than ranks": (4, 3, 2, 2)}
PLAIN = [(clip, "plain") for clip in CLIPS]
WAYS = {  # of ranks, and ranks of a clip
    (2, 2): [*PLAIN, ("odd", "recomputed"), ("odd", "compiled")],
    (4, 4): [*PLAIN, ("odd", "recomputed")],
    (4, 2): PLAIN,
}
STEPS, MIDDLE = 4, 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.xdist_group("ranks"),
    pytest.mark.timeout(900),  # six trainings, half of them of four ranks
]


@pytest.fixture(scope="module")
def steps():
    """(ranks, ranks of a clip) -> {(clip, way): loss and gradients}."""
    return {
        (world, count): launch(world, runs.clip_steps, {
            (clip, way): (count, NARROW, CLIPS[clip], way) for clip, way in ways
        })[0]
        for (world, count), ways in {(1, 1): PLAIN, **WAYS}.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "clip", "way"), [(ranks, *one) for ranks, ways in WAYS.items() for one in ways]
)
def test_a_clip_that_ranks_share_trains_as_on_one(steps, ranks, clip, way):
    loss, wanted = steps[1, 1][clip, "plain"]
    found, gradients = steps[ranks][clip, way]
    assert found == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == wanted.keys() and len(wanted) == 2 * 10 * 3
    for name, value in wanted.items():
        scale = abs(value).max()
        assert scale > 0
        assert_allclose(gradients[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synthesize(
        out=root / "clips", clips=12, frames=5, sizes=[24], seed=0, val_fraction=0.3, max_clips=100,
        max_bytes=10**9
    )  # fmt: skip
    latents, adapters = cache_demo(root / "clips", root)
    return [
        "experiment=dit_dora", f"data.latents={latents}", f"rgba_vae={adapters}", "task.rank=4",
        "task.checkpointing=true", f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={MIDDLE}", "callbacks.checkpoint.save_top_k=-1",
        "trainer.log_every_n_steps=2", "data.val_batch_size=1", "data.val_clips=2",
        "callbacks.samples.frames=5", "callbacks.samples.height=24", "callbacks.samples.width=24",
        "callbacks.samples.prompts=[a star,blue smoke,a ring]", "callbacks.samples.solver.steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found(settings, tmp_path_factory):
    """Kind of run -> what `fit` finds on rank 0; and the folder that they lie in."""
    root = tmp_path_factory.mktemp("shared")

    def run(world, **kinds):
        return launch(world, runs.fits, {
            kind: (root / kind, trainer, [
                *settings, f"task.context_parallel={count}", f"data.batch_size={4 * count // world}"
            ], source and root / source / f"checkpoints/{MIDDLE:08d}.ckpt")
            for kind, (trainer, count, source) in kinds.items()
        })[0]  # fmt: skip

    results = run(1, one=("default", 1, None))
    results |= run(2, ddp=("ddp", 2, None), on2=("ddp", 2, "one"))
    results |= run(4, fsdp=("fsdp", 2, None), on4=("ddp", 4, "fsdp"))
    return results | run(1, on1=("default", 1, "ddp")), root


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_runs_are_those_of_one_process(found, kind):
    """The same clips, losses, logged means and samples, on two ranks of a clip and on two times
    two."""
    (one, shared), root = (found[0][name] for name in ("one", kind)), found[1]
    assert len(one["losses"]) == STEPS and one["losses"][0] != one["losses"][-1]
    assert_close(shared["losses"], one["losses"], rtol=1e-5, atol=1e-6)
    assert_close(shared["metrics"], one["metrics"], rtol=1e-5, atol=1e-5)
    assert_close(shared["logged"], one["logged"], rtol=1e-4, atol=1e-5)
    sheets = [
        np.asarray(Image.open(root / name / f"samples/step_{STEPS:08d}/sheet.png")).astype(int)
        for name in ("one", kind)
    ]
    assert np.abs(sheets[0] - sheets[1]).max() <= 3  # of 8 bits where ranks hand them over


@pytest.mark.parametrize("kind", ["on1", "on2", "on4"])
def test_checkpoints_go_on_where_other_ranks_share_a_clip(found, kind):
    one, resumed = found[0]["one"], found[0][kind]
    assert_close(resumed["losses"], one["losses"][MIDDLE:], rtol=1e-5, atol=1e-6)
    assert_close(resumed["metrics"], one["metrics"], rtol=1e-5, atol=1e-5)
    assert_close(resumed["logged"], one["logged"][-len(resumed["logged"]) :], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_shared_is_refused(settings, tmp_path):
    cases = {
        "this run has 2. Start a multiple of 3": ["task.context_parallel=3"],
        "share the 1 heads of this DiT's attention": [
            "task.context_parallel=2", f"wan.transformer={one_head(tmp_path)}"],
        "were given different ones": ["task.context_parallel=2", "+trainer.context_parallel=1"],
        "colour and alpha of a joint model": [
            "experiment=dit_joint", "rgba_vae=null", "task.context_parallel=2"],
    }  # fmt: skip
    arguments = [(tmp_path, "ddp", [*settings, *more]) for more in cases.values()]
    for said in launch(2, runs.refusals, arguments):
        for wanted, error in zip(cases, said, strict=True):
            assert wanted in error


def one_head(folder):
    from acetate.models.loading import load_transformer
    from tests.conftest import TINY

    config = {**load_transformer(TINY).config, "num_attention_heads": 1, "attention_head_dim": 12}
    runs.WanTransformer3DModel.from_config(config).save_pretrained(folder / "one/transformer")
    return folder / "one"
