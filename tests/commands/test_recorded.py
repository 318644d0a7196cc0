"""What programs take from a run that they are given."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from acetate.commands.recorded import as_trained, preset_of, quoted, recorded_overrides, run_of
from tests.paths import ROOT


@pytest.fixture
def run(tmp_path):
    """A run's folder with its record, as train.py leaves it."""
    folder = tmp_path / "mine_dit/2026-01-01"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(
        {"x": torch.ones(1)},
        folder / "checkpoints/last.safetensors",
        {"base": json.dumps("of/wan-tiny")},
    )
    config = {
        "paths": {
            "root": "${oc.env:ACETATE_ROOT,${hydra:runtime.cwd}}",
            "outputs": "${paths.root}/outputs",
            "run": "",
        },
        "wan": {
            "vae": "Wan-AI/Wan2.1",
            "frames": 81,
            "height": 480,
            "width": 832,
            "dtype": "bfloat16",
        },
        "rgba_vae": "${paths.outputs}/mine",
        "callbacks": {"samples": {"frames": 17, "height": 64, "fps": 12}},
    }
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra/config.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": {"choices": {"wan": "wan21_1b"},
        "cwd": str(tmp_path)}}}),
                   folder / ".hydra/hydra.yaml")  # fmt: skip
    OmegaConf.save(OmegaConf.create(["experiment=dit_dora", "name=mine_dit", "resume=last",
        "data.latents=a"]),
                   folder / ".hydra/overrides.yaml")  # fmt: skip
    return folder


def test_the_run_of_whatever_is_given(run, tmp_path):
    checkpoint = run / "checkpoints/last.safetensors"
    for source in (run, run.parent, tmp_path, checkpoint, f"{run}@best", f"{run.parent}@last"):
        assert run_of(str(source)) == run
    assert run_of(str(tmp_path / "none")) is None
    assert recorded_overrides(run) == ["experiment=dit_dora", "name=mine_dit", "data.latents=a"]


ALSO = {
    "rgba_vae": ("rgba_vae",), "frames": ("callbacks.samples.frames", "wan.frames"),
    "width": ("callbacks.samples.width", "wan.width"),
}  # fmt: skip


def test_settings_of_a_run_count_unless_they_are_given(run, monkeypatch, capsys):
    monkeypatch.setenv("ACETATE_ROOT", "/srv")
    taken = as_trained(str(run), "dora", ["wan.dtype=float32", "frames=5"], ALSO)
    assert taken == ["wan.vae='Wan-AI/Wan2.1'", "wan.frames=81", "wan.height=480", "wan.width=832",
                     "rgba_vae='/srv/outputs/mine'", "width=832"]  # fmt: skip
    said = capsys.readouterr().out
    assert (
        f"dora={run}: wan=wan21_1b, rgba_vae=/srv/outputs/mine, width=832, as recorded in "
        f"{run}/.hydra" in said
    )
    assert as_trained(str(run), "dora", ["wan=tiny"], {}) == []


def test_a_path_that_was_given_in_another_folder_is_found_there(run, tmp_path):
    config = OmegaConf.load(run / ".hydra/config.yaml")
    config.rgba_vae = "outputs/mine"
    OmegaConf.save(config, run / ".hydra/config.yaml")
    (tmp_path / "outputs/mine").mkdir(parents=True)
    given = ["wan=tiny"]
    assert as_trained(str(run), "dora", given, {"rgba_vae": ("rgba_vae",)}) == [
        f"rgba_vae='{tmp_path}/outputs/mine'"
    ]


def test_a_file_without_its_run_says_its_base(run, tmp_path, capsys):
    file = (run / "checkpoints/last.safetensors").rename(tmp_path / "a.safetensors")
    assert as_trained(str(file), "dora", [], ALSO) == ["wan=tiny"]
    assert "the base that its metadata name" in capsys.readouterr().out
    assert as_trained(str(file), "dora", ["wan.vae=x"], ALSO) == []
    assert as_trained(str(tmp_path / "none"), "dora", [], ALSO) == []
    assert preset_of("/models/Wan2.1-T2V-14B-Diffusers") == "wan21_14b"
    assert preset_of("/models/other") is None


@pytest.mark.parametrize(
    "text",
    ["a, b: {c}=[d]", "a cat's \"tail\"", "line\nline\ttab", "${oc.env:HOME} \\${x} \\", "",
    " -dash ", "猫😀", "null",
     "1", "\\'", "true", "x" * 10_000],
)  # fmt: skip
def test_any_text_passes_through_overrides(text):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("command/sample", [f"prompt={quoted(text)}"])
    assert config.prompt == text


def test_values_pass_through_overrides():
    guide = {"centre": [0.25, 1], "axes": None, "clip": "a,b", "moving": True}
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("command/sample", [f"+x={quoted(guide)}"])
    assert OmegaConf.to_container(config.x) == guide
