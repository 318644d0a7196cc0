"""Files that hold a trained RGBA-VAE, each loaded into what decodes, and mostly encodes, like the
one that wrote it."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from acetate.formats.rgba_vae import load_rgba_vae, read_rgba_vae
from acetate.models.adapters import trainable_state
from acetate.models.rgba_vae import RGBAVAE
from tests.original import original_vae_state, wan_alpha_state


@pytest.fixture(scope="module", params=["wan21", "tiny"])
def trained(request, make_vae, tmp_path_factory):
    """(base folder, an RGBAVAE as Wan-Alpha trains one, residual blocks): every trainable tensor
    counts."""
    folder = tmp_path_factory.mktemp(request.param)
    make_vae(request.param).save_pretrained(folder)
    torch.manual_seed(0)
    vae = RGBAVAE(vae=make_vae(request.param), merge_init="scratch", lora_rank=3, lora_alpha=1.0)
    for name, parameter in trainable_state(vae).items():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.5)
    return str(folder), vae.eval(), {"wan21": 2, "tiny": 1}[request.param]


def assert_decodes_alike(ours, expected):
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    raw = torch.randn(
        1, *expected.geometry.latent_shape(5, 16, 16), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        for a, b in zip(
            ours.decode(ours.denormalise(raw)),
            expected.decode(expected.denormalise(raw)),
            strict=True,
        ):
            assert_close(a, b, rtol=0, atol=1e-5)


def assert_encodes_alike(ours, expected):
    rgb, alpha = torch.rand(1, 3, 5, 16, 16) * 2 - 1, torch.rand(1, 1, 5, 16, 16)
    with torch.no_grad():
        assert_close(ours.encode(rgb, alpha), expected.encode(rgb, alpha), rtol=0, atol=1e-6)
    assert ours.latents_sha256() == expected.latents_sha256()


WRAPPERS = {
    "flat": lambda state: state,
    "lightning": lambda state: {
        "state_dict": state,
        "epoch": 1,
        "global_step": 9,
        "pytorch-lightning_version": "2",
    },
    "prefixed": lambda state: {f"model.{name}": value for name, value in state.items()},
    "both": lambda state: {
        "state_dict": {f"_forward_module.{name}": value for name, value in state.items()}
    },
}


SMALL = pytest.mark.parametrize("trained", ["tiny"], indirect=True)


@pytest.mark.parametrize(
    ("wrapper", "suffix"),
    [("flat", ".bin"), ("lightning", ".ckpt"), ("prefixed", ".pth"), ("both", ".ckpt")],
)
def test_released_vae_checkpoint(trained, tmp_path, wrapper, suffix):
    base, vae, res_blocks = trained
    state = wan_alpha_state(vae, res_blocks) | {"pipe.dit.blocks.0.norm3.weight": torch.zeros(1)}
    torch.save(WRAPPERS[wrapper](state), tmp_path / f"pytorch_model{suffix}")
    ours = load_rgba_vae(vae=base, adapters=str(tmp_path / f"pytorch_model{suffix}"))
    assert (ours.lora_rank, ours.lora_alpha, ours.merge_init) == (3, 1.0, "scratch")
    assert_encodes_alike(ours, vae)
    assert_decodes_alike(ours, vae)


@SMALL
def test_a_half_precise_base_keeps_what_was_trained(trained, tmp_path):
    """It encodes as it does in training, and into latents of the same name."""
    base, vae, res_blocks = trained
    save_file(wan_alpha_state(vae, res_blocks), tmp_path / "vae.safetensors")
    half = load_rgba_vae(
        vae=base, adapters=str(tmp_path / "vae.safetensors"), frozen_dtype="bfloat16"
    )
    assert (
        half.encoder.net.conv_in.weight.dtype
        == half.decoder_rgb.post_quant_conv.weight.dtype
        == torch.bfloat16
    )
    assert half.latents_sha256() == vae.latents_sha256()
    rgb, alpha = torch.rand(1, 3, 5, 16, 16) * 2 - 1, torch.rand(1, 1, 5, 16, 16)
    with torch.no_grad():
        raw, expected = half.encode(rgb, alpha), vae.encode(rgb, alpha)
        assert (raw - expected).norm() < 0.05 * expected.norm()
        assert half.decode(raw)[0].isfinite().all()


def test_released_vae_as_safetensors(trained, tmp_path):
    base, vae, res_blocks = trained
    save_file(wan_alpha_state(vae, res_blocks), tmp_path / "vae.safetensors")
    assert_encodes_alike(load_rgba_vae(vae=base, adapters=str(tmp_path / "vae.safetensors")), vae)
    _, _, facts = read_rgba_vae(str(tmp_path / "vae.safetensors"), res_blocks)
    assert facts["eps"] == 0


@pytest.mark.parametrize("adapter", [".default", ""])
def test_decoder_bin(trained, tmp_path, adapter):
    """Only the decoders' LoRA, with or without PEFT's adapter name, in bf16 or not."""
    base, vae, res_blocks = trained
    state = {
        name: value for name, value in wan_alpha_state(vae, res_blocks).items() if ".lora_" in name
    }
    torch.save(
        {name.replace(".default", adapter): v for name, v in state.items()},
        tmp_path / "decoder.bin",
    )
    ours = load_rgba_vae(vae=base, adapters=str(tmp_path / "decoder.bin"), chunk=1)
    assert not isinstance(ours, RGBAVAE)
    assert ours.latents_sha256() is None
    assert_decodes_alike(ours, vae)
    with pytest.raises(
        ValueError,
        match=r"these files hold decoders only, and no merge block\. Give the released VAE",
    ):
        ours.encode(torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 1, 5, 16, 16))


@pytest.fixture
def pair(trained, make_vae, tmp_path):
    """ComfyUI's two files: whole Wan VAEs under original names, LoRA merged, made without our own
    merging."""
    _, vae, res_blocks = trained
    state = wan_alpha_state(vae, res_blocks)
    for channel, part in (("rgb", "vae_fgr"), ("alpha", "vae_pha")):
        whole = original_vae_state(make_vae("wan21" if res_blocks == 2 else "tiny"))
        for name, down in state.items():
            if name.startswith(part) and ".lora_A." in name:
                up = state[name.replace(".lora_A.", ".lora_B.")].flatten(1)
                conv = name.removeprefix(f"{part}.").split(".lora_A")[0].removesuffix(".conv3D")
                whole[f"{conv}.weight"] = whole[f"{conv}.weight"] + (up @ down.flatten(1)).view_as(
                    whole[f"{conv}.weight"]
                ) / len(down)
        save_file(whole, tmp_path / f"wan_alpha_2.1_vae_{channel}_channel.safetensors.safetensors")
    return tmp_path


def test_comfyui_pair(trained, pair):
    base, vae, _ = trained
    files = [
        str(pair / f"wan_alpha_2.1_vae_{name}_channel.safetensors.safetensors")
        for name in ("rgb", "alpha")
    ]
    for adapters in (str(pair), files):
        ours = load_rgba_vae(vae=base, adapters=adapters)
        assert not isinstance(ours, RGBAVAE)
        assert_decodes_alike(ours, vae)
    swapped = load_rgba_vae(vae=base, adapters=files[::-1])
    raw = torch.randn(1, *vae.geometry.latent_shape(1, 16, 16))
    with torch.no_grad():
        assert_close(
            (swapped.decode(raw)[0].mean(1, keepdim=True) + 1) / 2,
            vae.decode(raw)[1],
            rtol=0,
            atol=1e-5,
        )


@SMALL
def test_half_of_a_pair(trained, pair):
    base, *_ = trained
    file = pair / "wan_alpha_2.1_vae_rgb_channel.safetensors.safetensors"
    with pytest.raises(
        ValueError, match=r"one whole Wan VAE; of ComfyUI's pair give both: rgba_vae=\[RGB,ALPHA\]"
    ):
        load_rgba_vae(vae=base, adapters=str(file))
    with pytest.raises(ValueError, match="a pair is two files"):
        load_rgba_vae(vae=base, adapters=[str(file)])
    file.unlink()
    with pytest.raises(
        ValueError, match=r"holds 0 files \*vae_rgb_channel\* and 1 \*vae_alpha_channel\*"
    ):
        load_rgba_vae(vae=base, adapters=str(pair))


@SMALL
def test_pair_of_another_base(trained, pair, make_vae, tmp_path):
    _, _, res_blocks = trained
    make_vae("tiny" if res_blocks == 2 else "wan21").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="latents of another shape than those of"):
        load_rgba_vae(vae=str(tmp_path / "other"), adapters=str(pair))


def damage(state, kind):
    name = "vae_pha.decoder.conv1.conv3D.lora_A.default.weight"
    if kind == "missing":
        del state[name]
    elif kind == "renamed":
        state["vae_pha.decoder.conv9.conv3D.lora_A.default.weight"] = state.pop(name)
    elif kind == "shape":
        state[name] = state[name][:2]
    elif kind == "type":
        state[name] = state[name].to(torch.int8)
    elif kind == "only B":
        for other in [other for other in state if ".lora_A." in other]:
            del state[other]
    elif kind == "scalar":
        state[name] = torch.zeros(())
    elif kind == "vector":
        state[name] = torch.zeros(3)
    elif kind == "foreign":
        state["text_encoder.shared.weight"] = torch.zeros(1)
    elif kind == "place":
        state["middle.block.conv7.weight"] = torch.zeros(1)
    elif kind == "twice":
        state[name.replace(".default", "")] = state[name]
    elif kind == "prefixes":
        state["ema.vae_fgr.decoder.conv1.conv3D.lora_A.default.weight"] = state[name]
    else:
        for name in [name for name in state if ".lora_" in name]:
            del state[name]
    return state


@SMALL
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 missing: decoder_alpha\.net\.conv_in\.parametrizations\.weight\.0\.A"),
        ("renamed", r"1 not used: decoder_alpha\.net\.conv9|decoder_alpha\.net\.decoder\.conv9"),
        ("shape", r"decoder_alpha\.net\.conv_in\.parametrizations\.weight\.0\.A is \(2, "),
        (
            "type",
            r"1 of another type: decoder_alpha\.net\.conv_in\.parametrizations\.weight\.0\.A is "
            r"int8",
        ),
        (
            "only B",
            r"pytorch_model\.bin: no lora_A in it, or an empty one; every lora_B needs its own",
        ),
        (
            "scalar",
            r"vae_pha\.decoder\.conv1\.conv3D\.lora_A\.default\.weight: a LoRA matrix has two "
            r"dimensions",
        ),
        (
            "vector",
            r"vae_pha\.decoder\.conv1\.conv3D\.lora_A\.default\.weight: a LoRA matrix has two "
            r"dimensions",
        ),
        ("foreign", r"1 not used: text_encoder\.shared\.weight"),
        ("place", r"middle\.block\.conv7\.weight: names that Wan-Alpha does not use"),
        ("twice", r"the same tensor under two names"),
        ("prefixes", r"under 2 prefixes \(, ema\.\)"),
        ("no lora", r"no decoder LoRAs; Wan-Alpha's VAE files hold vae_fgr"),
    ],
)
def test_files_that_do_not_fit(trained, tmp_path, kind, message):
    base, vae, res_blocks = trained
    file = tmp_path / "pytorch_model.bin"
    torch.save(damage(wan_alpha_state(vae, res_blocks), kind), file)
    with pytest.raises(ValueError, match=message) as error:
        load_rgba_vae(vae=base, adapters=str(file))
    assert kind == "twice" or "pytorch_model.bin" in str(error.value)


@SMALL
def test_metadata_without_a_rank(trained, tmp_path):
    facts = {"schema": "1", "kind": '"rgba_vae"', "lora_rank": "null"}
    save_file({"vae.merge.x": torch.zeros(1)}, tmp_path / "vae.safetensors", facts)
    with pytest.raises(
        ValueError, match=r"vae\.safetensors: its metadata has no base, .*lora_rank=None"
    ):
        load_rgba_vae(vae=trained[0], adapters=str(tmp_path / "vae.safetensors"))
