"""The export command on what real runs wrote, and what other programs' loaders make of its
files."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from hydra import compose, initialize_config_dir
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from acetate.assembly import put_dora
from acetate.commands.export import main
from acetate.formats.few_step import merge_few_step
from acetate.formats.names import dit_name, vae_name
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.formats.wan_alpha import trainable_from_wan_alpha
from acetate.models.adapters import load_trainable
from acetate.models.loading import load_transformer, load_vae
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.text import TextEncoder
from acetate.sampling import Solver, sample_latents
from tests.commands.exported import (
    BASE,
    assert_decodes_the_same,
    assert_same,
    assert_same_output,
    dit_run,  # noqa: F401
    export,
    metadata,
    originals,  # noqa: F401
    trained_dit,  # noqa: F401
    vae_file,
    vae_run,  # noqa: F401
)
from tests.paths import ROOT

pytestmark = pytest.mark.xdist_group("exports")  # whose runs are made once


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_acetate_is_what_training_writes(tmp_path, request, stage):
    """Out of the .ckpt, bit for bit; of the VAE, which ran with EMA, the average."""
    run = request.getfixturevalue(f"{stage}_run")
    export(tmp_path / "out", f"checkpoint={run}", "to=acetate")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    expected = run / "checkpoints/last.safetensors"
    assert_same(load_file(file), load_file(expected))
    assert metadata(file) == metadata(expected)
    export(tmp_path / "again", f"checkpoint={file}", "to=acetate")
    assert_same(load_file(tmp_path / "again" / file.name), load_file(expected))


def test_raw_weights(tmp_path, vae_run):
    out = export(tmp_path / "out", f"checkpoint={vae_run}", "to=acetate", "ema=false")
    raw = torch.load(vae_run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert_same(load_file(out / "rgba_vae.safetensors"), raw)
    load_rgba_vae(vae=BASE, adapters=str(out / "rgba_vae.safetensors"))


@pytest.mark.parametrize("layout", ["wan21", "tiny"])
def test_wan_alpha_vae(tmp_path, originals, layout):
    """The released convention, alpha 1, gives what alpha 4 gave in training; decoder.bin is its
    second half."""
    base = str(originals.folder / "Wan2.1_VAE.pth") if layout == "wan21" else BASE
    file = vae_file(tmp_path, base)
    out = export(tmp_path / "out", f"checkpoint={file}", "to=wan-alpha", f"wan.vae={base}")
    flat, decoder = (
        torch.load(out / name, weights_only=True) for name in ("pytorch_model.bin", "decoder.bin")
    )
    assert_same(
        decoder, {name: value for name, value in flat.items() if not name.startswith("middle.")}
    )
    vae = load_vae(base)
    model = RGBAVAE(vae=vae, merge_init="scratch", lora_rank=2, lora_alpha=1.0)
    load_trainable(model, trainable_from_wan_alpha(flat, vae.config.num_res_blocks), "flat")
    trained = load_rgba_vae(vae=base, adapters=str(file))
    rgb, alpha = torch.rand(1, 3, 5, 16, 24) * 2 - 1, torch.rand(1, 1, 5, 16, 24)
    with torch.no_grad():
        raw = trained.encode(rgb, alpha)
        assert_close(model.encode(rgb, alpha), raw, rtol=0, atol=0)
        for ours, theirs in zip(model.decode(raw), trained.decode(raw), strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_residual_merge_block_has_no_wan_alpha_file(tmp_path, vae_run):
    with pytest.raises(
        ValueError, match=r"merge_init=residual adds to Wan's own latents.*decoder_only=true"
    ):
        export(tmp_path / "out", f"checkpoint={vae_run}", "to=wan-alpha")
    assert not (tmp_path / "out").exists()
    out = export(tmp_path / "out", f"checkpoint={vae_run}", "to=wan-alpha", "decoder_only=true")
    assert sorted(path.name for path in out.iterdir()) == ["decoder.bin", "export.json"]


def test_wan_alpha_dora_is_read_by_the_loader_of_released_files(tmp_path, dit_run, trained_dit):
    out = export(tmp_path / "out", f"checkpoint={dit_run}", "to=wan-alpha")
    released, ours = load_transformer(BASE), load_transformer(BASE)
    put_dora(released, str(out / "t2v.safetensors"))
    own, rounded = dit_run / "checkpoints/last.safetensors", tmp_path / "rounded.safetensors"
    with safe_open(own, "pt") as file:
        facts = file.metadata()
    short = {name: value.bfloat16().float() for name, value in load_file(own).items()}
    save_file(short, rounded, facts)
    put_dora(ours, str(rounded))
    assert not torch.equal(
        ours.blocks[0].attn1.to_q.weight, load_transformer(BASE).blocks[0].attn1.to_q.weight
    )
    assert_same(released.state_dict(), ours.state_dict(), atol=1e-6)
    assert metadata(out / "t2v.safetensors")["mean_shift"] == 1.0


def test_comfyui_vaes_load_in_original_names(tmp_path, originals):
    out = export(tmp_path / "out", f"checkpoint={originals.vae}", "to=comfyui", *originals.wan)
    files = {
        channel: out / f"acetate_vae_{channel}_channel.safetensors" for channel in ("rgb", "alpha")
    }
    names = load_file(files["rgb"]).keys()
    assert "decoder.middle.0.residual.0.gamma" in names  # which tells ComfyUI a Wan VAE
    # which would tell it Wan2.2's
    assert "decoder.upsamples.0.upsamples.0.residual.2.weight" not in names
    assert names == torch.load(originals.folder / "Wan2.1_VAE.pth", weights_only=True).keys()
    base = load_vae(str(originals.folder / "Wan2.1_VAE.pth"))
    rgb, alpha = (load_vae(str(file)) for file in files.values())
    assert_decodes_the_same(
        load_rgba_vae(vae=originals.wan[0][8:], adapters=str(originals.vae)), rgb, alpha
    )
    for vae in (rgb, alpha):
        assert_same(vae.encoder.state_dict(), base.encoder.state_dict())


def test_comfyui_vaes_of_wan_tiny(tmp_path, vae_run, capsys):
    out = export(tmp_path / "out", f"checkpoint={vae_run}", "to=comfyui")
    assert "does not load there" in capsys.readouterr().out
    vaes = []
    for channel in ("rgb", "alpha"):
        state = load_file(out / f"acetate_vae_{channel}_channel.safetensors")
        vae = AutoencoderKLWan.from_config(load_vae(BASE).config)
        vae.load_state_dict(
            {vae_name(name, vae.config.num_res_blocks): value for name, value in state.items()}
        )
        vaes.append(vae.eval())
    assert_decodes_the_same(load_rgba_vae(vae=BASE, adapters=str(vae_run)), *vaes)


def test_comfyui_dit_in_original_names(tmp_path, originals):
    out = export(tmp_path / "out", f"checkpoint={originals.dit}", "to=comfyui", *originals.wan)
    state = load_file(out / "dit.safetensors")
    # What ComfyUI reads off a Wan DiT: its kind, width, output, feed-forward width, depth and input
    assert state["head.modulation"].shape == (1, 2, 24)
    assert state["head.head.weight"].shape[0] == 16 * 4
    assert state["blocks.0.ffn.0.weight"].shape[0] == 32
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == {"0", "1"}
    assert state["patch_embedding.weight"].shape[1] == 16
    assert not any(
        name.startswith(("model.", "net.", "diffusion_model.")) or "img_emb" in name
        for name in state
    )
    assert (
        state.keys() == load_file(originals.folder / "diffusion_pytorch_model.safetensors").keys()
    )
    (out / "config.json").write_text(json.dumps({"num_heads": 2}))
    assert_same_output(
        originals.transformer, load_transformer(str(out / "dit.safetensors")), width=16
    )


def test_comfyui_dit_of_wan_tiny(tmp_path, dit_run, trained_dit, capsys):
    out = export(tmp_path / "out", f"checkpoint={dit_run}", "to=comfyui")
    assert "heads to be 128 wide" in capsys.readouterr().out
    transformer = load_transformer(BASE)
    transformer.load_state_dict(
        {dit_name(name): value for name, value in load_file(out / "dit.safetensors").items()}
    )
    assert_same_output(trained_dit, transformer)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("rank", "dtype"), [(4, "bfloat16"), (128, "float32")])
def test_svd_lora_misses_what_it_says(tmp_path, dit_run, trained_dit, capsys, rank, dtype):
    """Merged by the reader of few-step files, which takes the same names; a full rank misses
    nothing."""
    out = export(
        tmp_path / "out",
        f"checkpoint={dit_run}",
        "to=comfyui",
        "dit=svd-lora",
        f"rank={rank}",
        f"dtype={dtype}",
    )
    file, base, ours, lora = (
        out / f"dit_lora_rank{rank}.safetensors",
        *(load_transformer(BASE) for _ in range(3)),
    )
    assert all(name.startswith("diffusion_model.blocks.") for name in load_file(file))
    errors = metadata(file)["error_of_layer"]
    assert f"= {metadata(file)['error']:.4f} over all layers" in capsys.readouterr().out
    put_dora(ours, str(dit_run))
    assert merge_few_step(lora, load_file(file)) == len(errors) == 10 * len(base.blocks)
    for layer, error in errors.items():
        weight, wanted, found = (
            m.get_parameter(dit_name(f"{layer}.weight")) for m in (base, ours, lora)
        )
        assert_close(
            (wanted - found).norm() / (wanted - weight).norm(),
            torch.tensor(error),
            rtol=1e-2,
            atol=1e-4,
        )
    assert (0.05 < metadata(file)["error"] < 0.9) if rank == 4 else (metadata(file)["error"] < 1e-4)
    if rank == 128:
        assert_same_output(trained_dit, lora)
    # as diffusers reads it
    WanPipeline.load_lora_into_transformer(WanPipeline.lora_state_dict(str(file)), base)
    assert_same_output(lora, base)


def test_comfyui_native_dora_warns(tmp_path, dit_run, capsys):
    out = export(tmp_path / "out", f"checkpoint={dit_run}", "to=comfyui", "dit=dora")
    assert "WARNING: ComfyUI's versions disagree on DoRA" in capsys.readouterr().out
    state = load_file(out / "dit_dora.safetensors")
    assert len(state) == 40 * load_transformer(BASE).config.num_layers
    assert state["diffusion_model.blocks.0.cross_attn.o.dora_scale"].shape == (128, 1)


def test_diffusers_vaes(tmp_path, vae_run):
    out = export(tmp_path / "out", f"checkpoint={vae_run}", "to=diffusers")
    rgb, alpha = (AutoencoderKLWan.from_pretrained(out / name) for name in ("vae", "vae_alpha"))
    assert_decodes_the_same(load_rgba_vae(vae=BASE, adapters=str(vae_run)), rgb, alpha)


@pytest.mark.slow
@pytest.mark.long
def test_diffusers_pipeline_samples_as_we_do(tmp_path, dit_run, cached, trained_dit):
    out = export(tmp_path / "out", f"checkpoint={dit_run}", "to=diffusers", f"rgba_vae={cached[1]}")
    assert_same_output(trained_dit, WanTransformer3DModel.from_pretrained(out / "transformer"))
    assert_same_output(
        trained_dit, PeftModel.from_pretrained(load_transformer(BASE), str(out / "adapter"))
    )
    assert json.loads((out / "export.json").read_text())["rgba_vae"] == str(cached[1])
    pipe = WanPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise, text = (
        torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        TextEncoder(BASE, 64, dtype="float32"),
    )
    call = {"prompt": "a red disc", "num_frames": 5, "height": 32, "width": 32,
        "num_inference_steps": 2,
            "guidance_scale": 3.0, "latents": noise, "max_sequence_length": 64}  # fmt: skip
    latents = pipe(**call, output_type="latent").frames
    solver, context, negative = (
        Solver(steps=2, guidance=3.0),
        text.context(["a red disc"]),
        text.context([""]),
    )
    merged = load_transformer(BASE)
    put_dora(merged, str(dit_run))
    assert_close(
        latents, sample_latents(merged, noise, context, negative, solver), rtol=0, atol=1e-4
    )
    frames = pipe(**call, output_type="pt").frames
    model = load_rgba_vae(vae=BASE, adapters=str(cached[1]))
    rgb, _ = model.decode(model.denormalise(latents))
    assert_close(frames[0], (rgb[0].clamp(-1, 1).transpose(0, 1) + 1) / 2, rtol=0, atol=1e-4)
    alpha = AutoencoderKLWan.from_pretrained(out / "vae_alpha")
    assert_decodes_the_same(model, pipe.vae, alpha)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["to=comfyui", "wan.transformer={folder}"],
            r"last\.ckpt was trained on another base \(.*Choose the wan=",
        ),
        (
            ["to=diffusers", "rgba_vae={dit}"],
            "holds a dit_dora; give a checkpoint of experiment=vae_rgba",
        ),
        (
            ["to=diffusers", "rgba_vae={vae}"],
            "The DoRA's vae_sha256 is .*Give the rgba_vae= that its latents",
        ),
    ],
)
def test_bad_settings_say_what_to_do(tmp_path, dit_run, vae_run, wan_folder, overrides, message):
    places = {"folder": wan_folder, "dit": dit_run, "vae": vae_run}
    with pytest.raises(ValueError, match=message):
        export(
            tmp_path / "out",
            f"checkpoint={dit_run}",
            *(part.format(**places) for part in overrides),
        )
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_base(tmp_path, vae_run, wan_folder):
    with pytest.raises(ValueError, match=r"was trained on another base .*base_sha256"):
        export(tmp_path / "out", f"checkpoint={vae_run}", "to=comfyui", f"wan.vae={wan_folder}")


def test_files_of_others_are_kept(tmp_path, dit_run):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds what no export wrote \(thesis\.txt\)"):
        export(tmp_path, f"checkpoint={dit_run}", "to=acetate")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_default_folders_tell_runs_and_settings_apart(dit_run, tmp_path):
    def exported(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            places = [
                f"paths.root={ROOT}",
                f"paths.outputs={tmp_path}",
                f"checkpoint={dit_run}",
                "to=comfyui",
            ]
            main(compose("command/export", [*places, *overrides]))
        return sorted(path.name for path in (tmp_path / "exports").iterdir())

    name = "last-step-00000002_comfyui"  # of a run that recorded nothing: its file's
    assert exported() == exported() == [f"{name}-merged"]
    assert exported("dtype=float32") == [f"{name}-merged", f"{name}-merged_2"]
    assert exported("dit=dora") == [f"{name}-dora", f"{name}-merged", f"{name}-merged_2"]
