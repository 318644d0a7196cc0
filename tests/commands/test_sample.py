"""The sample command on the shipped base, with adapters that a real run wrote."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from acetate.assembly import load_dit
from acetate.commands.sample import (
    check_settings,
    file_name,
    folder_for,
    guide_from,
    mended,
    read_prompts,
    sheet_name,
)
from acetate.guides import ClipGuide
from acetate.models.dit import add_dora, merge_dora
from acetate.models.loading import load_transformer, load_vae
from acetate.models.rgba_vae import RGBAVAE
from acetate.sampling import EllipsePath
from acetate.video_io import read_rgba
from tests.original import original_transformer_state, wan_alpha_state
from tests.paths import ROOT
from tests.processes import program

BASE = str(ROOT / "assets/wan-tiny")


def config_for(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("command/sample", [f"paths.root={ROOT}", *overrides])


def run(tmp_path, *arguments):
    return program(
        tmp_path.with_suffix(".log"), "acetate.commands.sample", f"out={tmp_path}", *arguments
    )


@pytest.mark.slow
def test_writes_clips_that_editors_open_and_seeds_reproduce(tmp_path, cached, dora):
    small = [
        f"rgba_vae={cached[1]}",
        f"dora={dora}",
        "steps=2",
        "frames=5",
        "height=24",
        "width=32",
        "formats=[png]",
    ]
    guide = ["guide.centre=[0.4,0.5]", "guide.axes=[0.6,0.4]"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n\nblue smoke\n")
    code, printed = run(
        tmp_path / "a", f"prompts={prompts}", "count=2", "batch_size=3", *small, *guide
    )
    assert code == 0, printed[-2000:]
    folders = sorted(path.name for path in (tmp_path / "a").glob("*_png"))
    names = ("000-a-red-disc", "000-a-red-disc", "001-blue-smoke", "001-blue-smoke")
    assert folders == [f"{name}-seed{seed}_png" for seed, name in enumerate(names)]
    clip = read_rgba(tmp_path / "a" / folders[3])
    assert clip.frames.shape == (5, 24, 32, 4)
    settings = json.loads((tmp_path / "a/001-blue-smoke-seed3.json").read_text())
    assert settings["seed"] == 3
    assert settings["mean_shift"] == 0.5
    code, printed = run(tmp_path / "b", 'prompt="blue smoke"', "seed=3", *small, *guide)
    assert code == 0, printed[-2000:]
    alone = read_rgba(tmp_path / "b/000-blue-smoke-seed3_png").frames
    other = read_rgba(tmp_path / "a" / folders[2]).frames  # the same prompt, another seed
    apart, seeds_apart = (abs(x.astype(int) - alone.astype(int)) for x in (clip.frames, other))
    # sums of another order, which guidance enlarges, and then rounding
    assert apart.max() <= 8 and apart.mean() < 0.5 < 4 < seeds_apart.mean()


@pytest.mark.long
@pytest.mark.slow
def test_a_run_of_a_users_own_is_enough(tmp_path, cached):
    """Base, RGBA-VAE and size are the run's; the JSON makes the clip again; no clip is overwritten
    unasked."""
    latents, adapters = cached
    code, printed = program(
        tmp_path / "log", "train.py", "experiment=dit_dora", "name=mine_dit",
        f"paths.outputs={tmp_path}",
        f"paths.cache={tmp_path}", f"data.latents={latents}", f"rgba_vae={adapters}",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1", "task.rank=2", "data.batch_size=1", "data.num_workers=0",
        "callbacks.samples.frames=5", "callbacks.samples.height=24", "callbacks.samples.width=32",
        "callbacks.samples.fps=7", "callbacks.samples.solver.steps=1",
    )  # fmt: skip
    assert code == 0, printed[-2000:]
    mine, asked = f"dora={tmp_path}/mine_dit", 'prompt="a, red: disc {x}"'
    code, printed = run(
        tmp_path / "a", mine, asked, "steps=1", "seed=4", "guide.centre=[0.4,0.5]", "formats=[png]"
    )
    assert code == 0, printed[-2000:]
    assert f"rgba_vae={adapters}, frames=5, height=24, width=32, fps=7, as recorded in" in printed
    (file,) = (tmp_path / "a").glob("*.json")
    clip = json.loads(file.read_text())
    assert [clip[name] for name in ("frames", "height", "width", "fps", "rgba_vae", "seed")] == [
        5, 24, 32, 7, str(adapters), 4
    ]  # fmt: skip
    assert clip["made_with"]["dora"]["step"] == 1
    assert "/mine_dit/" in clip["made_with"]["dora"]["run"]
    assert len(clip["made_with"]["ellipses"]) == 2
    code, printed = run(tmp_path / "b", f"settings={file}")
    assert code == 0, printed[-2000:]
    (again,) = (tmp_path / "b").glob("*.json")
    assert again.read_text() == file.read_text()
    (one,), (two,) = ((tmp_path / name).glob("*_png") for name in "ab")
    assert (read_rgba(one).frames == read_rgba(two).frames).all()
    code, printed = run(tmp_path / "b", f"settings={file}", "guidance=2")
    assert code != 0
    assert "exists, made with guidance 5.0, now 2" in printed
    assert again.read_text() == file.read_text()
    code, printed = run(tmp_path / "b", f"settings={file}", "guidance=2", "overwrite=true")
    assert code == 0, printed[-2000:]
    assert json.loads(again.read_text())["guidance"] == 2


def test_each_call_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda text: "now")
    assert [str(folder_for(config_for())) for _ in range(2)] == ["samples/now", "samples/now_2"]
    assert folder_for(config_for("out=there")) == Path("there")
    for name in ("sheet.png", "sheet_2.png"):
        (tmp_path / name).touch()
    assert sheet_name(tmp_path, overwrite=False).name == "sheet_3.png"


def test_dora_is_merged(dora):
    config = config_for(f"dora={dora}")
    ours, facts = load_dit(config, "cpu")
    expected = load_transformer(BASE)
    add_dora(expected, 2, 2)
    state = {name.removeprefix("transformer."): value for name, value in load_file(dora).items()}
    expected.load_state_dict(state, strict=False)
    merge_dora(expected)
    assert facts["mean_shift"] == 0.5
    for (name, a), b in zip(ours.state_dict().items(), expected.state_dict().values(), strict=True):
        assert_close(a, b, msg=name)


def test_dora_of_another_base_is_refused(dora, wan_folder):
    with pytest.raises(ValueError, match="was trained on another DiT"):
        load_dit(config_for(f"dora={dora}", f"wan.transformer={wan_folder}"), "cpu")


@pytest.mark.slow
@pytest.mark.long
def test_few_step_lora_is_an_explicit_switch(tmp_path, dora):
    plain, _ = load_dit(config_for(f"dora={dora}"), "cpu")
    name = "blocks.0.self_attn.q"
    width = plain.config.num_attention_heads * plain.config.attention_head_dim
    down, up = torch.randn(2, width), torch.randn(width, 2)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(
        {f"diffusion_model.{key}": value for key, value in tensors.items()},
        tmp_path / "few.safetensors",
    )
    few, _ = load_dit(
        config_for(f"dora={dora}", f"few_step.lora={tmp_path}/few.safetensors"), "cpu"
    )
    change = few.blocks[0].attn1.to_q.weight - plain.blocks[0].attn1.to_q.weight
    assert_close(change, 0.5 * up @ down, rtol=1e-4, atol=1e-4)  # alpha / rank
    tensors = {
        f"{name.replace('0', '77')}.lora_down.weight": down,
        f"{name.replace('0', '77')}.lora_up.weight": up,
    }
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"blocks\.77\.attn1\.to_q\.weight does not exist in this DiT"
    ):
        load_dit(config_for(f"dora={dora}", f"few_step.lora={tmp_path}/other.safetensors"), "cpu")


def released_dora(transformer, rank=2):
    """Random DoRA tensors under the names of the released t2v.safetensors."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in original_transformer_state(transformer).items():
        if re.fullmatch(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight", name):
            layer, (out, width) = name.removesuffix(".weight"), value.shape
            state[f"{layer}.lora_A.default.weight"] = torch.randn(rank, width, generator=generator)
            state[f"{layer}.lora_B.default.weight"] = (
                torch.randn(out, rank, generator=generator) * 0.1
            )
            state[f"{layer}.lora_magnitude_vector.default.weight"] = value.norm(dim=1) * 1.1
    return state


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("adapter", [".default", ""])
def test_released_dora(tmp_path, prefix, adapter):
    state = released_dora(base := load_transformer(BASE))
    save_file(
        {f"{prefix}{k}".replace(".default", adapter): v for k, v in state.items()},
        tmp_path / "t2v.safetensors",
    )
    ours, facts = load_dit(config_for(f"dora={tmp_path}/t2v.safetensors"), "cpu")
    assert facts["mean_shift"] == 0.05
    layer = "blocks.0.ffn.0"
    down, up, magnitude = (
        state[f"{layer}.lora_{p}.default.weight"] for p in ("A", "B", "magnitude_vector")
    )
    adapted = base.blocks[0].ffn.net[0].proj.weight + up @ down
    expected = magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    assert_close(ours.blocks[0].ffn.net[0].proj.weight.data, expected.data, rtol=1e-5, atol=1e-6)


def test_released_dora_that_does_not_fit(tmp_path):
    file = tmp_path / "t2v.safetensors"
    state = released_dora(load_transformer(BASE))
    name = "blocks.0.ffn.0.lora_magnitude_vector.default.weight"
    for damaged, message in (
        (
            {k: v for k, v in state.items() if k != name},
            r"1 missing: blocks\.0\.ffn\.net\.0\.proj\.lora_magnitude",
        ),
        (
            state | {name: state[name][:, None]},
            r"magnitude_vector\.default\.weight is \(256, 1\), the model has \(256,\)",
        ),
        (
            state | {name: state[name].to(torch.int8)},
            r"magnitude_vector\.default\.weight is int8, needed",
        ),
    ):
        save_file(damaged, file)
        with pytest.raises(ValueError, match=rf"t2v\.safetensors.*{message}"):
            load_dit(config_for(f"dora={file}"), "cpu")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t2v\.safetensors cannot be read"):
        load_dit(config_for(f"dora={file}"), "cpu")


def test_few_step_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"few_step\.lora=.*none does not exist"):
        load_dit(config_for("dora=null", f"few_step.lora={tmp_path}/none"), "cpu")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"lora\.gguf: a file of weights ends in \.safetensors"):
        load_dit(config_for("dora=null", f"few_step.lora={tmp_path}/lora.gguf"), "cpu")
    for i, part in enumerate(("lora_down", "lora_up"), 1):
        tensor = {
            f"blocks.0.self_attn.q.{part}.weight": torch.ones(*((2, 128) if i == 1 else (128, 2)))
        }
        save_file(tensor, tmp_path / f"lora-0000{i}-of-00002.safetensors")
    few, _ = load_dit(config_for("dora=null", f"few_step.lora={tmp_path}"), "cpu")
    change = few.blocks[0].attn1.to_q.weight - load_transformer(BASE).blocks[0].attn1.to_q.weight
    assert_close(change, torch.full((128, 128), 2.0), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_samples_with_released_files(tmp_path):
    """The VAE checkpoint, its decoder.bin, t2v.safetensors, a few-step LoRA and a Gaussian mask,
    all as released."""
    vae = RGBAVAE(vae=load_vae(BASE), merge_init="scratch", lora_rank=2, lora_alpha=1.0)
    state = wan_alpha_state(vae, res_blocks=1)
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(
        {name: value for name, value in state.items() if ".lora_" in name}, tmp_path / "decoder.bin"
    )
    save_file(released_dora(load_transformer(BASE)), tmp_path / "t2v.safetensors")
    save_file(
        {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(256)}, tmp_path / "few.safetensors"
    )
    torch.save(torch.rand(2, 9, 17), tmp_path / "gauss_mask")
    given = [f"dora={tmp_path}/t2v.safetensors", f"few_step.lora={tmp_path}/few.safetensors",
        "frames=5", "height=24",
             "width=32", "steps=1", "formats=[png]", f"guide.mask={tmp_path}/gauss_mask",
             "prompt=disc"]  # fmt: skip
    clips = []
    for file in ("pytorch_model.bin", "decoder.bin"):
        code, printed = run(tmp_path / file.split(".")[0], f"rgba_vae={tmp_path}/{file}", *given)
        assert code == 0, printed[-2000:]
        clips.append(read_rgba(tmp_path / file.split(".")[0] / "000-disc-seed0_png").frames)
    assert clips[0].shape == (5, 24, 32, 4)
    assert (clips[0] == clips[1]).all()


def test_guides_of_settings(tmp_path):
    assert guide_from(config_for().guide) is None
    drawn = guide_from(config_for("guide.centre=[0.5,0.25]", "guide.end_angle=30").guide)
    assert drawn == EllipsePath(centre=(0.5, 0.25), end_angle=30)
    assert guide_from(config_for("guide.clip=a.webm").guide) == ClipGuide(Path("a.webm"))
    for one in ("mask", "clip"):
        with pytest.raises(ValueError, match=rf"guide\.{one} and guide\.centre are both given"):
            guide_from(config_for(f"guide.{one}=x", "guide.centre=[0.5,0.25]").guide)


def test_prompts(tmp_path):
    with pytest.raises(ValueError, match="Give either prompt="):
        read_prompts(config_for())
    with pytest.raises(FileNotFoundError, match="does not exist; it is a text file"):
        read_prompts(config_for(f"prompts={tmp_path}/none.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(config_for(f"prompts={tmp_path}/empty.txt"))
    assert file_name(3, "A ring / of FIRE!", 7) == "003-a-ring-of-fire-seed7"
    assert file_name(0, "猫 😀\n", 1) == "000-empty-seed1"
    assert len(file_name(0, "-x" * 10_000, 1)) < 70
    assert mended("caf\udce9 é") == "caf? é"
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_prompts(config_for(f"prompts={tmp_path}/latin.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out={file}"], "is a file. Give a folder"),
        (["out={file}/below"], "is a file. Give a folder"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_settings(config_for(*(text.format(file=tmp_path / "file") for text in arguments)))


@pytest.mark.slow
def test_bad_input_is_named(tmp_path, cached, dora):
    code, printed = run(
        tmp_path / "out",
        'prompt="a long red disc"',
        f"rgba_vae={cached[1]}",
        f"dora={dora}",
        "height=50",
    )
    assert code != 0
    assert "height 50; this VAE needs multiples of 8" in printed
    assert not (tmp_path / "out").exists()
