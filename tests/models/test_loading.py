import json
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from acetate.models import hub
from acetate.models.loading import load_transformer, load_vae, transformer_sha256, weights_sha256
from acetate.models.text import TextEncoder
from tests.hostile import Hostile
from tests.original import original_transformer_state, original_umt5_state, original_vae_state


def assert_same_weights(ours, expected):
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert_close(value, expected.state_dict()[name].float(), rtol=0, atol=0, msg=name)


@pytest.fixture
def folder(make_vae, tmp_path):
    """A writable diffusers folder of the small VAE."""
    make_vae("tiny").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def weights(folder):
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part", ["", "vae"])
def test_diffusers_folder(wan_folder, make_vae, part):
    vae = load_vae(str(wan_folder / part))
    assert_same_weights(vae, make_vae("wan21"))
    assert vae.config.z_dim == 16
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize("part", ["", "transformer"])
def test_diffusers_transformer(wan_folder, make_transformer, part):
    transformer = load_transformer(str(wan_folder / part))
    assert_same_weights(transformer, make_transformer())
    x, t, context = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 16)
    ours, expected = (
        m(x, t, context, return_dict=False)[0] for m in (transformer, make_transformer())
    )
    # what is no weight, the rotary table, is right too
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_config_comes_along(folder, make_vae):
    vae = load_vae(str(folder))
    for key in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
        assert list(vae.config[key]) == list(make_vae("tiny").config[key])


def test_one_safetensors_file_beside_its_config(weights, make_vae):
    assert_same_weights(load_vae(str(weights)), make_vae("tiny"))


def test_shards_of_a_folder(weights, make_vae):
    state = load_file(weights)
    names = sorted(state)
    for i, part in enumerate((names[:20], names[20:]), 1):
        file = weights.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
        save_file({name: state[name] for name in part}, file)
    weights.unlink()
    assert_same_weights(load_vae(str(weights.parent)), make_vae("tiny"))
    file.unlink()
    with pytest.raises(
        ValueError, match=r"tiny holds 1 of 2 shards: diffusion_pytorch_model-00001-of-00002"
    ):
        load_vae(str(weights.parent))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_original_vae(make_vae, tmp_path, suffix):
    vae, file = make_vae("wan21"), tmp_path / f"Wan2.1_VAE{suffix}"
    state = original_vae_state(vae)
    assert "decoder.upsamples.4.shortcut.weight" in state
    assert "encoder.downsamples.8.time_conv.weight" in state
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = load_vae(str(file))
    assert_same_weights(loaded, vae)
    for key in (
        "base_dim",
        "z_dim",
        "dim_mult",
        "num_res_blocks",
        "temperal_downsample",
        "latents_mean",
    ):
        assert loaded.config[key] == vae.config[key], key


def test_original_names_of_a_smaller_vae(make_vae, tmp_path):
    """Two residual blocks to a decoder stage in the place of Wan2.1's three; such a file lacks the
    latent constants."""
    vae = make_vae("tiny")
    state = original_vae_state(vae)
    assert state["decoder.upsamples.2.resample.1.weight"].ndim == 4
    save_file(state, tmp_path / "vae.safetensors")
    assert_same_weights(load_vae(str(tmp_path / "vae.safetensors")), vae)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_original_transformer(make_transformer, tmp_path, prefix):
    transformer = make_transformer()
    state = {
        f"{prefix}{name}": value for name, value in original_transformer_state(transformer).items()
    }
    assert f"{prefix}blocks.1.cross_attn.norm_q.weight" in state
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "_class_name": "WanModel"}))
    loaded = load_transformer(str(tmp_path))
    assert_same_weights(loaded, transformer)
    x, t, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 16)
    ours, expected = (m(x, t, context, return_dict=False)[0] for m in (loaded, transformer))
    assert_close(ours, expected, rtol=0, atol=1e-6)


def test_original_transformer_without_head_count(make_transformer, tmp_path):
    file = tmp_path / "wan.safetensors"
    save_file(original_transformer_state(make_transformer()), file)
    with pytest.raises(
        ValueError, match=r"width 24 is no multiple of 128.*config\.json with num_heads"
    ):
        load_transformer(str(file))


def test_folder_of_the_original_release(make_vae, make_transformer, wan_folder, tmp_path):
    """Wan2.1-T2V-1.3B as it is downloaded: one folder for the VAE, the DiT and the text encoder."""
    from transformers import UMT5EncoderModel

    torch.save(original_vae_state(make_vae("wan21")), tmp_path / "Wan2.1_VAE.pth")
    umt5 = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder")
    torch.save(original_umt5_state(umt5), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(wan_folder / "tokenizer", tmp_path / "google/umt5-xxl")
    save_file(
        original_transformer_state(make_transformer()),
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "dim": 24}))
    assert_same_weights(load_transformer(str(tmp_path)), make_transformer())
    assert_same_weights(load_vae(str(tmp_path)), make_vae("wan21"))
    assert TextEncoder(str(tmp_path), 8).sha256() == TextEncoder(str(wan_folder), 8).sha256()
    torch.save({}, tmp_path / "other_VAE.pth")
    with pytest.raises(ValueError, match=r"holds Wan2\.1_VAE\.pth, other_VAE\.pth\. Name the file"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_file(folder, weights, make_vae, dtype):
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    vae = load_vae(str(folder), dtype)
    assert {p.dtype for p in vae.parameters()} == {dtype}
    expected = make_vae("tiny").state_dict()
    for name, value in vae.state_dict().items():
        assert_close(value, expected[name].half().to(dtype), rtol=0, atol=0)


def test_hash_is_of_the_numbers(folder, weights, make_vae, tmp_path):
    vae = make_vae("wan21")
    torch.save(original_vae_state(vae), tmp_path / "Wan2.1_VAE.pth")
    assert weights_sha256(load_vae(str(tmp_path / "Wan2.1_VAE.pth"))) == weights_sha256(vae)
    half = load_vae(str(folder)).half()
    assert weights_sha256(half) == weights_sha256(load_vae(str(folder), torch.float16).float())
    before = weights_sha256(half)
    next(half.parameters()).data.view(-1)[0] += 1
    assert weights_sha256(half) != before


@pytest.mark.parametrize("source", ["/nowhere/wan", "./wan", "wan", "a/b/c"])
def test_no_such_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"^{re.escape(source)} does not exist.*diffusers folder"
    ):
        load_vae(source)


@pytest.mark.parametrize("error", [OSError("no route"), LocalEntryNotFoundError("offline")])
def test_hub_name_without_network(tmp_path, monkeypatch, error):
    def offline(*args, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.HfApi, "model_info", offline)
    with pytest.raises(
        FileNotFoundError,
        match=r"^wan\.vae=Wan-AI/Wan2\.1 is no folder here.*cannot be reached.*hf downl",
    ):
        load_vae("Wan-AI/Wan2.1")


def test_hub_name(wan_folder, tmp_path, monkeypatch, make_vae):
    asked = {}

    def download(name, *, allow_patterns, ignore_patterns, local_files_only):
        assert not local_files_only
        asked[name] = allow_patterns
        return str(wan_folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert_same_weights(load_vae("Wan-AI/Small"), make_vae("wan21"))
    assert asked == {"Wan-AI/Small": ["vae/*"]}


def test_hub_name_of_an_original_release(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder vae/; its diffusers version"):
        load_vae("Wan-AI/Wan2.1-T2V-1.3B")


def test_folder_without_weights(folder, weights):
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="tiny holds no weights"):
        load_vae(str(folder))


def test_weights_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"config\.json does not exist; .* need it beside them"
    ):
        load_vae(str(folder))


def test_truncated_safetensors(folder, weights):
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*fetch it anew"):
        load_vae(str(folder))


@pytest.mark.parametrize("keep", [0, 10, -100])
def test_truncated_pth(make_vae, tmp_path, keep):
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save(original_vae_state(make_vae("wan21")), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.pth cannot be read.*fetch it anew"):
        load_vae(str(file))


def test_pth_from_before_the_zip_format(make_vae, tmp_path):
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save(original_vae_state(make_vae("wan21")), file, _use_new_zipfile_serialization=False)
    assert_same_weights(load_vae(str(file)), make_vae("wan21"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], r"Wan\.pth holds a list, no state dict"),
        (
            {"state_dict": {"a": torch.zeros(1)}, "epoch": 3},
            r"Wan\.pth holds state_dict, epoch: no tensor\. A training",
        ),
    ],
)
def test_pth_that_is_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "Wan.pth")
    with pytest.raises(ValueError, match=message):
        load_vae(str(tmp_path / "Wan.pth"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config\.json is not JSON"), ("[1]", r"config\.json holds a list; a config is an")],
)
def test_broken_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_vae(str(folder))


def test_half_precision_keeps_what_wan_computes_in_fp32(wan_folder):
    transformer = load_transformer(str(wan_folder), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in transformer.named_parameters()}
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert dtypes["scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert (
        dtypes["blocks.0.attn1.to_q.weight"] == dtypes["patch_embedding.weight"] == torch.bfloat16
    )


@pytest.mark.parametrize("packed", [True, False])
def test_pickles_run_no_code(tmp_path, packed):
    """In torch's zip format and as a bare pickle."""
    file, target = tmp_path / "Wan2.1_VAE.pth", tmp_path / "run"
    if packed:
        torch.save({"encoder.conv1.weight": Hostile(target)}, file)
        assert zipfile.is_zipfile(file)
    else:
        file.write_bytes(pickle.dumps({"encoder.conv1.weight": Hostile(target)}))
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.pth cannot be read"):
        load_vae(str(file))
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(target)))
    assert target.exists()  # it would have run


def test_names_missing_unused_and_misshapen_tensors(folder, weights):
    state = load_file(weights)
    del state["encoder.conv_in.bias"]
    state["post_quant_conv.bias"] = torch.zeros(7)
    state["decoder.extra"] = torch.zeros(1)
    save_file(state, weights)
    with pytest.raises(ValueError) as error:
        load_vae(str(folder))
    message = str(error.value)
    assert str(folder) in message
    assert "1 missing: encoder.conv_in.bias" in message
    assert "1 not used: decoder.extra" in message
    assert "post_quant_conv.bias is (7,), the model has (4,)" in message


def test_config_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_dim": 16}))
    with pytest.raises(
        ValueError, match=r"of another shape: encoder\.conv_in\.weight is \(8, 3, 3, 3, 3\)"
    ):
        load_vae(str(folder))


def test_original_vae_that_lacks_a_tensor(make_vae, tmp_path):
    state = original_vae_state(make_vae("wan21"))
    del state["conv2.weight"]
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"lacks conv2\.weight"):
        load_vae(str(tmp_path / "vae.pth"))


def test_a_dit_is_known_by_its_file_in_every_precision(wan_folder):
    hashes = {
        transformer_sha256(load_transformer(str(wan_folder), dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(hashes) == 1
    assert all(hashes)


def test_one_tensor_under_two_names_is_refused(wan_folder, tmp_path):
    state = load_file(wan_folder / "transformer/diffusion_pytorch_model.safetensors")
    name = next(iter(state))
    save_file(
        state | {f"model.diffusion_model.{name}": torch.zeros_like(state[name])},
        tmp_path / "dit.safetensors",
    )
    shutil.copy(wan_folder / "transformer/config.json", tmp_path)
    with pytest.raises(ValueError, match="the same tensor under two names"):
        load_transformer(str(tmp_path / "dit.safetensors"))
