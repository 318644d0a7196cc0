import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from acetate.callbacks.samples import Samples, contact_sheet
from acetate.data.latent_shards import read_latents
from acetate.regions import outlines
from acetate.sampling import decode
from acetate.video_out import GUIDE
from tests.compose import composed
from tests.conftest import cache_demo
from tests.tasks.test_dit import SMALL, config_for, fit

SAMPLES = [
    "callbacks.samples.prompts=[a red disc,blue smoke]",
    "callbacks.samples.frames=5",
    "callbacks.samples.height=24",
    "callbacks.samples.width=24",
    "callbacks.samples.solver.steps=2",
]


def test_samples_at_validation(tmp_path, cached):
    fit(config_for(tmp_path, cached, "trainer.max_steps=2", *SAMPLES))
    folder = tmp_path / "samples/step_00000002"
    assert Image.open(folder / "sheet.png").size[0] > 100
    assert {path.name for path in folder.glob("*.webm")} == {"00.webm", "01.webm"}
    assert not list(folder.glob(".*"))


def test_prompts_are_captions_of_validation_clips_by_default(tmp_path, cached):
    config = config_for(
        tmp_path, cached, "trainer.max_steps=2", *SAMPLES[1:], "callbacks.samples.prompts=null"
    )
    trainer, *_ = fit(config)
    (samples,) = [callback for callback in trainer.callbacks if isinstance(callback, Samples)]
    held = [read_latents(window[0])["prompt"] for window in trainer.datamodule.val_windows]
    assert samples.shown == held[:4] and all(held)
    assert len(list((tmp_path / "samples/step_00000002").glob("*.webm"))) == len(samples.shown)


@pytest.mark.slow
@pytest.mark.long
def test_sampling_leaves_training_as_it_was(tmp_path, cached):
    plain = fit(config_for(tmp_path / "a", cached, "trainer.max_steps=4"))
    sampled = fit(config_for(tmp_path / "b", cached, "trainer.max_steps=4", *SAMPLES))
    assert plain[2].losses == sampled[2].losses


def test_every_second_validation_also_after_resume(tmp_path, cached):
    second = [*SAMPLES, "callbacks.samples.every_n_validations=2", "task.decay_steps=8"]
    fit(config_for(tmp_path, cached, "trainer.max_steps=2", *second))
    assert not (tmp_path / "samples").exists()
    fit(
        config_for(tmp_path, cached, "trainer.max_steps=6", *second),
        resume=tmp_path / "checkpoints/last.ckpt",
    )
    assert [folder.name for folder in (tmp_path / "samples").iterdir()] == ["step_00000004"]


def test_an_image_to_video_run_shows_what_it_was_given(tmp_path, many_shards):
    latents, adapters = cache_demo(many_shards, tmp_path, condition="first")
    fast = ["task.lr=0.05", "task.warmup_steps=0", "trainer.max_steps=2"]
    config = composed(
        tmp_path, "experiment=i2v_dora", f"data.latents={latents}", f"rgba_vae={adapters}",
        *SMALL, *fast, "callbacks.samples.solver.steps=2",
    )  # fmt: skip
    trainer, task, _ = fit(config)
    (samples,) = [callback for callback in trainer.callbacks if isinstance(callback, Samples)]
    held = [read_latents(window[0]) for window in trainer.datamodule.val_windows]
    assert samples.shown == [sample["prompt"] for sample in held] and len(held) == 2
    assert samples.size == (5, 24, 24)  # that of the cache
    folder = tmp_path / "samples/step_00000002"
    text = contact_sheet([("a", torch.ones(3, 5, 24, 24), torch.ones(1, 5, 24, 24))] * 2, "")
    assert Image.open(folder / "sheet.png").width > text.width  # by a column
    clips = samples._sample(trainer, task)
    for (_, rgb, alpha), sample in zip(clips, held, strict=True):
        assert alpha.shape == (1, 6, 24, 24)
        ((seen, matte),) = decode(samples.vae, sample["condition"][None, :, :1].float())
        assert_close(rgb[:, :1], seen, rtol=0, atol=1e-4)
        assert_close(alpha[:, :1], matte, rtol=0, atol=1e-4)
    assert (samples.outlines[0] - samples.outlines[1]).abs().max() > 0.01  # of their own subjects
    samples.given.reverse()
    (_, other, _), _ = samples._sample(trainer, task)
    assert (other[:, 1:] - clips[0][1][:, 1:]).abs().max() > 1e-3


def test_another_vae_is_refused(tmp_path, cached):
    with pytest.raises(ValueError, match=r"vae_sha256 is .* the latents were cached with"):
        config = config_for(tmp_path, cached, "trainer.max_steps=2", *SAMPLES)
        config.callbacks.samples.build_vae.adapters = str(other_adapters(tmp_path, cached[1]))
        fit(config)


def other_adapters(tmp_path, adapters):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(adapters, "pt") as file:
        state = {name: file.get_tensor(name) + 0.01 for name in file.keys()}  # noqa: SIM118
        save_file(state, tmp_path / "other.safetensors", file.metadata())
    return tmp_path / "other.safetensors"


def test_contact_sheet_shows_clip_and_alpha():
    rgb, alpha = torch.ones(3, 5, 16, 16), torch.zeros(1, 5, 16, 16)
    alpha[..., 8:] = 1
    one, two = (contact_sheet([("a", rgb, alpha)] * n, "title") for n in (1, 2))
    assert two.size[1] > one.size[1]
    colors = {color for _, color in one.getcolors(10**6)}
    assert {(255, 255, 255), (0, 0, 0)} <= colors
    assert GUIDE not in colors
    guide = outlines(torch.tensor([[1.5, 1.5, 2.0, 2.0, 0.0]] * 2), 4, 4, 5)
    marked = contact_sheet([("a", rgb, alpha)], "title", guide)
    assert GUIDE in {color for _, color in marked.getcolors(10**6)}
    red = torch.tensor([1.0, -1, -1])[:, None, None, None].expand(3, 1, 16, 16)
    given = contact_sheet([("a", rgb, alpha)], "title", given=[(red, torch.ones(1, 1, 16, 16))])
    pixels = np.asarray(given)[given.height // 2]
    first = (pixels == (255, 0, 0)).all(1).nonzero()[0]
    assert first.min() < 10 and first.max() < given.width / 8  # before the clip's own frames
    assert given.width * 4 == pytest.approx(one.width * 5, rel=0.01)  # and before their alpha


def test_long_prompts_are_legible_on_a_contact_sheet():
    rgb, alpha = torch.ones(3, 5, 16, 16), torch.zeros(1, 5, 16, 16)
    heights = [
        contact_sheet([(prompt, rgb, alpha)], "").height
        for prompt in ("a", "word " * 60, "word " * 2000)
    ]
    assert heights[0] < heights[1] < heights[2] < heights[0] + 100
