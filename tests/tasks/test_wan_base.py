"""A few real steps of both base tasks, from data to a folder that the loader takes."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from lightning import Trainer
from torch.testing import assert_close

from acetate.data.endless import EndlessDataModule
from acetate.draws import ClipDraws
from acetate.models.loading import load_transformer, load_vae
from acetate.models.text import embed_prompt
from acetate.models.wan import WanDecoder, WanEncoder, WanHead
from acetate.tasks.wan_base import WanDiTTask, WanVAETask, start_as_image_model_, train_tokenizer

TINY = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
}


def data(frames=5):
    return EndlessDataModule(
        frames=frames, height=16, width=16, batch_size=2, val_clips=3, seed=0, num_workers=0
    )


def trainer(folder, steps, val_every=None, **settings):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=val_every or steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def vae_task(save_to, vae=None, **settings):
    torch.manual_seed(0)
    settings = {
        "lr": 1e-3,
        "warmup_steps": 0,
        "edge_weight": 0.02,
        "kl_weight": 1e-4,
        "seed": 0,
    } | settings
    return WanVAETask(vae=vae or AutoencoderKLWan(**TINY), save_to=str(save_to), **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, task, the weights it started with) of four steps of the VAE task."""
    folder = tmp_path_factory.mktemp("vae")
    task = vae_task(folder / "wan" / "vae")
    before = {name: value.clone() for name, value in task.vae.state_dict().items()}
    trainer(folder, 4).fit(task, data())
    return folder / "wan", task, before


def test_every_tensor_of_the_vae_trains(trained):
    _, task, before = trained
    assert [
        name for name, value in task.vae.state_dict().items() if torch.equal(value, before[name])
    ] == []
    assert task.trainer.global_step == 4


def test_vae_is_saved_as_it_was_trained(trained):
    folder, task, _ = trained
    saved = load_vae(str(folder))
    for name, value in task.vae.state_dict().items():
        assert_close(saved.state_dict()[name], value.half().float(), rtol=0, atol=0, msg=name)
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config["dim_mult"] == [1, 2, 4]
    assert config["scale_factor_spatial"] == 4
    assert config["scale_factor_temporal"] == 4


def test_saved_constants_are_the_measured_ones(trained):
    """Over all validation clips, however they are batched."""
    folder, task, _ = trained
    module = data()
    videos = torch.cat([batch["video"] for batch in module.val_dataloader()])
    assert len(videos) == 3
    with torch.no_grad():
        latents = task.head(task.encoder(videos))[0]
    config = load_vae(str(folder)).config
    assert_close(torch.tensor(config.latents_mean), latents.mean((0, 2, 3, 4)), rtol=0, atol=1e-4)
    per_channel = latents.transpose(0, 1).flatten(1)
    assert_close(torch.tensor(config.latents_std), per_channel.std(1), rtol=1e-3, atol=1e-5)


def test_going_on_from_a_saved_vae(trained, tmp_path):
    folder, task, _ = trained
    resumed = vae_task(tmp_path / "vae", init_from=str(folder / "vae"))
    for name, value in resumed.vae.state_dict().items():
        assert_close(value, task.vae.state_dict()[name].half().float(), rtol=0, atol=0, msg=name)
    trainer(tmp_path, 1).fit(resumed, data(frames=9))
    assert load_vae(str(tmp_path / "vae")).config.z_dim == 16


def test_sanity_check_saves_nothing(tmp_path):
    task = vae_task(tmp_path / "vae")
    settings = {
        "max_steps": 1,
        "val_check_interval": 10,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
    }
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", enable_model_summary=False, **settings, **quiet).fit(
        task, data(frames=1)
    )
    assert not (tmp_path / "vae").exists()


def test_loss_parts_add_up(tmp_path):
    task = vae_task(tmp_path)
    task.log = task.log_dict = lambda *args, **kwargs: None
    batch = next(iter(data().val_dataloader()))
    torch.manual_seed(0)
    outputs = task.training_step(batch, 0)
    assert_close(outputs["loss"], sum(outputs["parts"].values()))
    assert sorted(outputs["parts"]) == ["edge", "kl", "mse"]
    outputs["loss"].backward()
    missing = [name for name, p in task.vae.named_parameters() if p.grad is None]
    assert missing == []


def test_kl_by_hand(tmp_path):
    """KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2; with m = 0 and v = e^-6 it is 2.501."""
    task = vae_task(tmp_path, kl_weight=1.0)
    task.log = task.log_dict = lambda *args, **kwargs: None
    with torch.no_grad():
        task.head.conv_out.weight.zero_()
        task.head.conv_out.bias.zero_()
        task.head.quant_conv.bias[:16] = 0
    parts = task.training_step(next(iter(data().val_dataloader())), 0)["parts"]
    assert parts["kl"].item() == pytest.approx(2.50124, rel=1e-4)


@pytest.mark.parametrize("layout", ["wan21", "tiny"])
def test_start_as_image_model(make_vae, layout):
    """A still as a clip: every latent frame is the picture's own, and so is every decoded frame."""
    vae = copy.deepcopy(make_vae(layout))
    start_as_image_model_(vae)
    picture = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder, head, decoder = WanEncoder(vae), WanHead(vae), WanDecoder(vae)
    with torch.no_grad():
        one, log_variance = head(encoder(picture))
        clip, _ = head(encoder(picture.expand(-1, -1, 9, -1, -1)))
        assert_close(clip, one.expand(-1, -1, 3, -1, -1), rtol=1e-4, atol=1e-5)
        decoded = decoder(one.expand(-1, -1, 3, -1, -1))
        assert_close(decoded, decoder(one).expand_as(decoded), rtol=1e-4, atol=1e-5)
    assert log_variance.mean() == pytest.approx(-6, abs=3)
    assert vae.quant_conv.bias[vae.config.z_dim :].eq(-6).all()
    assert one.std() > 0.01  # the picture still comes through


@pytest.fixture(scope="module")
def dit_task(tmp_path_factory):
    """The DiT task after three real steps, and its folder."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=[1, 2, 2],
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=64,
    )
    task = WanDiTTask(
        vae=AutoencoderKLWan(**TINY),
        transformer=transformer,
        text={"width": 16, "layers": 1, "vocabulary": 320},
        prompt_length=24,
        prompt_dropout=0.5,
        shift=2.0,
        lr=1e-3,
        warmup_steps=0,
        seed=0,
        save_to=str(folder / "wan"),
    )
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    trainer(folder, 3).fit(task, data())
    return task, folder / "wan", before


def test_dit_trains_with_its_text_encoder_on_a_frozen_vae(dit_task):
    task, _, before = dit_task
    frozen = ("encoder.", "head.")
    trained = {
        name.split(".")[0]
        for name, p in task.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert trained == {"transformer", "text_encoder"}
    assert all(
        torch.equal(p, before[n]) for n, p in task.named_parameters() if n.startswith(frozen)
    )


def test_dit_is_saved_as_it_was_trained(dit_task):
    task, folder, _ = dit_task
    assert sorted(path.name for path in folder.iterdir()) == [
        "text_encoder",
        "tokenizer",
        "transformer",
    ]
    saved = load_transformer(str(folder))
    for name, value in task.transformer.state_dict().items():
        assert_close(saved.state_dict()[name], value.half().float(), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("prompt", ["", "a teal ring that turns", "smoke"])
def test_saved_text_encoder_reads_prompts_as_in_training(dit_task, tmp_path, prompt):
    """Alone and unpadded at inference, padded in a batch in training: the same embedding, then
    zeros."""
    task, folder, _ = dit_task
    task.eval()
    with torch.no_grad():
        expected = task.context([prompt, "another and longer prompt"])[:1]
    embeds = embed_prompt(prompt, str(folder), task.prompt_length, str(tmp_path))
    assert_close(embeds, expected, rtol=0, atol=0.01)  # half precision
    assert (embeds.abs().amax(-1) > 0).sum() == (expected.abs().amax(-1) > 0).sum()


def test_validation_tells_whether_prompts_are_read(dit_task, monkeypatch):
    task, _, _ = dit_task
    batch, logged = next(iter(data().val_dataloader())), {}
    monkeypatch.setattr(task, "prompt_dropout", 0.0)
    monkeypatch.setattr(task, "log", lambda name, value, **_: logged.update({name: float(value)}))
    with torch.no_grad():
        task.eval().validation_step(batch, 0)
        assert logged["val/prompt_gain"] != 0
        task.validation_step({**batch, "prompt": ["one"] * len(batch["prompt"])}, 0)
    assert logged["val/prompt_gain"] == 0


def test_a_dit_goes_on_from_an_earlier_one(dit_task):
    task, folder, _ = dit_task
    other = copy.deepcopy(task)
    for value in other.parameters():
        value.data.zero_()
    other.start_from(folder)
    for name, value in task.transformer.state_dict().items():
        assert_close(other.transformer.state_dict()[name], value.half().float(), msg=name)
    with torch.no_grad():
        prompt = ["a teal ring that turns"]
        assert_close(other.context(prompt), task.context(prompt), rtol=0, atol=0.01)


def test_dit_step_is_a_function_of_the_draws(dit_task):
    task, _, _ = dit_task
    batch = next(iter(data().val_dataloader()))

    def step(*parts):
        with torch.no_grad():
            draws = ClipDraws(batch["key"], *parts, device=torch.device("cpu"))
            return task.step(batch, draws, task.train_levels)

    task.train()
    first = step(0, "train", 1)
    torch.manual_seed(123)
    assert_close(step(0, "train", 1), first, rtol=0, atol=0)
    assert step(0, "train", 2) != first


def test_tokenizer_ends_with_the_end_token_and_comes_back():
    tokenizer = train_tokenizer(["a red disc", "smoke over a blue sea"], vocabulary=300, length=16)
    ids = tokenizer("a blue disc").input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a blue disc"
    assert tokenizer("").input_ids == [1]
    unseen = "Ünïcode ✓ 漢"  # bytes, so nothing is unknown
    assert tokenizer.decode(tokenizer(unseen).input_ids, skip_special_tokens=True) == unseen
