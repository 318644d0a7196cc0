"""Image to video on a base that reads a CLIP embedding of the picture: real modules, tiny."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPVisionModel

from acetate.cost import latent_sample_bytes
from acetate.models.dit import velocity
from acetate.models.image_encoder import ImageEncoder
from acetate.models.loading import load_transformer
from acetate.pipeline import RGBAPipeline
from tests.commands.exported import export
from tests.conftest import cache_demo
from tests.formats.test_names import wan21_i2v
from tests.looking_base import WIDTH, looking, of, write_clip, write_dit  # noqa: F401  (a fixture)
from tests.tasks.test_dit import fit
from tests.tasks.test_i2v import config_for, resumed_exactly

TOKENS = 5  # of 28 pixels in patches of 14, and one of all
SIZE = {"frames": 5, "height": 32, "width": 32, "steps": 2}


@pytest.fixture(scope="module")
def embedded(shards, looking, tmp_path_factory):
    base = str(looking)
    return cache_demo(
        shards, tmp_path_factory.mktemp("embedded"), condition="first", text_encoder=base,
        image_encoder=base, prompt_length=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(looking, embedded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit(config_for(folder, embedded, *of(looking), "trainer.max_steps=3"))
    return folder / "checkpoints/last.safetensors"


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[8:24, 8:24] = (200, 30, 30, 128)
    Image.fromarray(pixels).save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def pipeline(looking, embedded, dora, **settings):
    wan = dict.fromkeys(("vae", "transformer", "text_encoder", "image_encoder"), str(looking))
    wan = {f"wan.{name}": value for name, value in (wan | {"prompt_length": 512}).items()}
    settings = {"rgba_vae": str(embedded[1]), "device": "cpu", "wan": "tiny", **wan, **settings}
    return RGBAPipeline.load(None if dora is None else str(dora), **settings)


def test_the_embedding_is_diffusers_own_of_the_picture_over_grey(looking):
    rgb, alpha = torch.rand(1, 3, 40, 56) * 2 - 1, torch.rand(1, 1, 40, 56)
    over_grey = ((rgb * alpha + 1) / 2 * 255).round().to(torch.uint8)
    encoder = ImageEncoder(str(looking))
    pipe = WanImageToVideoPipeline(
        None, None, None, None, image_processor=encoder.processor,
        image_encoder=CLIPVisionModel.from_pretrained(looking / "image_encoder"),
    )  # fmt: skip
    theirs = pipe.encode_image(Image.fromarray(over_grey[0].permute(1, 2, 0).numpy()), "cpu")
    assert_close(encoder(rgb, alpha), theirs, rtol=0, atol=1e-5)
    assert encoder.facts() | {"sha256": ""} == {"sha256": "", "tokens": TOKENS, "width": WIDTH}
    hidden = torch.where(alpha > 0.5, rgb, -rgb)  # colour that nobody sees
    opaque = (alpha > 0.5).float()
    assert torch.equal(encoder(rgb, opaque), encoder(hidden, opaque))


def test_files_of_transformers_4_are_read(looking, tmp_path):
    """Its names had a prefix, and releases hold what is not read."""
    for part in ("image_encoder", "image_processor"):
        shutil.copytree(looking / part, tmp_path / part)
    file = tmp_path / "image_encoder/model.safetensors"
    state = {f"vision_model.{name}": value for name, value in load_file(file).items()}
    save_file({**state, "visual_projection.weight": torch.zeros(2, 2)}, file)
    assert ImageEncoder(str(tmp_path)).sha256() == ImageEncoder(str(looking)).sha256()
    del state["vision_model.pre_layrnorm.bias"]
    save_file(state, file)
    with pytest.raises(ValueError, match=r"pre_layrnorm\.bias"):
        ImageEncoder(str(tmp_path))


def test_the_cache_holds_embeddings_of_first_frames(looking, embedded, tmp_path):
    manifest = json.loads((embedded[0] / "manifest.json").read_text())
    assert manifest["image_encoder"] == ImageEncoder(str(looking)).facts()
    for shard in manifest["shards"]:  # what `acetate cost` reads of them
        sizes = [
            latent_sample_bytes(
                (16, *one["shape"]), one["tokens"], 64, condition=True, image=(TOKENS, WIDTH)
            )
            for one in shard["samples"]
        ]
        assert 0 <= shard["bytes"] - sum(sizes) < 1024 + 10240  # as in tests/test_cost.py
    data = instantiate(config_for(tmp_path, embedded, *of(looking)).data)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["image_embeds"].shape == (2, TOKENS, WIDTH)
    assert (batch["image_embeds"][0] - batch["image_embeds"][1]).abs().max() > 0.01
    assert data._blank()["image_embeds"].shape == (1, TOKENS, WIDTH)


@torch.no_grad()
def test_no_picture_is_zeros_of_any_number(looking):
    transformer = load_transformer(str(looking))
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 64)
    none = velocity(transformer, x, t, text)
    zeros = velocity(transformer, x, t, text, None, torch.zeros(1, TOKENS, WIDTH))
    assert_close(zeros, none, rtol=0, atol=1e-5)
    some = velocity(transformer, x, t, text, None, torch.randn(1, TOKENS, WIDTH))
    assert (some - none).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"64 tokens; .* takes 512\. Give wan\.prompt_length=512"):
        velocity(transformer, x, t, text[:, :64])


def test_a_dropped_condition_has_no_embedding(looking, embedded, tmp_path):
    task = instantiate(config_for(tmp_path, embedded, *of(looking)).task)
    task.configure_model()
    latents, embeds = torch.ones(2, 16, 2, 4, 4), torch.ones(2, TOKENS, WIDTH)
    batch = {"latents": latents, "condition": latents, "image_embeds": embeds}
    given = task.field({**batch, "without": torch.tensor([True, False])}).keywords
    assert not given["image_embeds"][0].any() and given["image_embeds"][1].all()
    assert torch.equal(task.field(batch).keywords["image_embeds"], embeds)


@pytest.mark.slow
def test_trains_resumes_exactly_and_samples(looking, embedded, trained, picture, tmp_path):
    resumed_exactly(tmp_path, embedded, *of(looking))
    Image.new("RGBA", (32, 32), (0, 0, 255, 255)).save(tmp_path / "blue.png")
    sampled = pipeline(looking, embedded, trained)
    clips = sampled(["a", "a"], image=[picture, tmp_path / "blue.png"], seed=1, **SIZE)
    text = sampled("a", seed=1, **SIZE)[0]
    for one, other in ((clips[0], clips[1]), (clips[0], text)):
        assert (one.rgb - other.rgb).abs().max() > 1e-3
    embeds = sampled.look_at([picture, picture], 2, (5, 32, 32))
    assert embeds is not None and embeds.shape == (2, TOKENS, WIDTH)
    assert sampled.look_at(None, 1, (5, 32, 32)) is None


@pytest.mark.slow
def test_diffusers_loads_the_export_with_its_image_encoder(
    looking, embedded, trained, picture, tmp_path
):  # fmt: skip
    out = export(
        tmp_path / "out", f"checkpoint={trained}", "to=diffusers", f"rgba_vae={embedded[1]}",
        "dtype=float32", *of(looking),
    )  # fmt: skip
    pipe = WanImageToVideoPipeline.from_pretrained(str(out), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    ours = pipeline(looking, embedded, trained)
    assert (out / "adapter").is_dir()
    context, _ = ours.embed(["a"])
    size = (5, 32, 32)
    condition, _ = ours.condition(picture, None, 1, size)
    embeds = ours.look_at(picture, 1, size)
    x, t = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        expected = velocity(ours.transformer, x, t, context["a"][None], condition, embeds)
        found = velocity(pipe.transformer, x, t, context["a"][None], condition, embeds)
    assert_close(found, expected, rtol=0, atol=1e-5)
    with Image.open(picture) as image:
        grey = Image.new("RGBA", image.size, (128, 128, 128))
        shown = Image.alpha_composite(grey, image).convert("RGB")
    assert_close(pipe.encode_image(shown, "cpu"), embeds, rtol=0, atol=0.05)
    frames = pipe(
        image=shown, prompt="a", num_frames=5, height=32, width=32, num_inference_steps=2,
        max_sequence_length=512, output_type="latent",
    ).frames  # fmt: skip
    assert frames.shape == (1, 16, 2, 8, 8) and frames.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_comfyui_gets_the_original_layout_whole(looking, embedded, trained, tmp_path):
    out = export(tmp_path / "out", f"checkpoint={trained}", "to=comfyui", *of(looking))
    held = load_file(out / "dit.safetensors")
    table = wan21_i2v(32, 48, WIDTH, layers=2, text=64, freq=32)
    assert {name: tuple(value.shape) for name, value in held.items()} == table
    (out / "config.json").write_text('{"num_heads": 2}')  # of the original release
    theirs = load_transformer(str(out / "dit.safetensors"))
    ours = pipeline(looking, embedded, trained).transformer
    assert theirs.config.image_dim == WIDTH and theirs.config.in_channels == 36
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 64)
    given = torch.randn(1, 20, 2, 4, 4), torch.randn(1, TOKENS, WIDTH)
    found = velocity(theirs, x, t, text, *given)
    assert_close(found, velocity(ours, x, t, text, *given), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"wan\.image_encoder=null"):
        more = [*of(looking)[:-2], "wan.image_encoder=null", "wan.prompt_length=512"]
        rgba = ["to=diffusers", f"rgba_vae={embedded[1]}"]
        export(tmp_path / "no", f"checkpoint={trained}", *rgba, *more)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_errors_say_the_way_out(looking, embedded, conditioned, trained, picture, tmp_path):
    base = of(looking)
    with pytest.raises(ValueError, match=r"24 wide; the cached samples hold none\. Cache them"):
        fit(config_for(tmp_path / "a", conditioned, *base, "trainer.max_steps=1"))
    other = tmp_path / "other"
    write_dit(other / "transformer", image_dim=40, added_kv_proj_dim=32)
    with pytest.raises(ValueError, match="40 wide; the cached samples hold such of 24"):
        more = [*base, f"wan.transformer={other}", "trainer.max_steps=1"]
        fit(config_for(tmp_path / "b", embedded, *more))
    with pytest.raises(ValueError, match=r"wan\.image_encoder=null\. Give the folder or hub name"):
        pipeline(looking, embedded, None, **{"wan.image_encoder": None})("a", image=picture, **SIZE)
    write_clip(other, seed=5)
    wrong = pipeline(looking, embedded, trained, **{"wan.image_encoder": str(other)})
    with pytest.raises(ValueError, match="The DoRA's image_encoder_sha256 is"):
        wrong("a", image=picture, **SIZE)
    write_clip(other, width=48)
    wrong = pipeline(looking, embedded, None, **{"wan.image_encoder": str(other)})
    with pytest.raises(ValueError, match="embeddings 48 wide, and this DiT reads 24"):
        wrong("a", image=picture, **SIZE)
    shutil.rmtree(other / "image_processor")
    with pytest.raises(FileNotFoundError, match=r"has no folder image_processor/\. Give wan\.im"):
        ImageEncoder(str(other))
    write_dit(other / "two", image_dim=24, added_kv_proj_dim=32, pos_embed_seq_len=10)
    with pytest.raises(ValueError, match="a first and a last picture together"):
        transformer = load_transformer(str(other / "two"))
        velocity(transformer, torch.zeros(1, 16, 2, 4, 4), torch.zeros(1), torch.zeros(1, 512, 64))


@pytest.fixture(scope="module")
def conditioned(shards, tmp_path_factory):
    """Latents with a condition, without embeddings."""
    return cache_demo(shards, tmp_path_factory.mktemp("conditioned"), condition="first")
