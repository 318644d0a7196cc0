import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from acetate.commands.same_base import SameBase
from acetate.data.latents import LatentDataModule
from acetate.data.shards import MANIFEST, ShardError
from tests.conftest import TINY

SETTINGS = {"batch_size": 1, "seed": 0, "num_workers": 0, "val_batch_size": 1, "val_clips": 1}


def compare(latents, vae, rgba_vae):
    data = LatentDataModule(latents=str(latents), prompt_length=64, **SETTINGS)
    data.setup()
    SameBase(vae, rgba_vae).setup(SimpleNamespace(datamodule=data), None, "fit")


def with_hash(latents, out, name):
    """Latents whose manifest, and what it says of its maker, have another hash."""
    shutil.copytree(latents, out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest[name] = manifest["made_by"]["settings"][name] = "0" * 64
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def test_latents_of_another_base_or_vae_are_refused(cached, tmp_path, wan_folder):
    latents, adapters = cached
    compare(latents, TINY, str(adapters))
    with pytest.raises(ShardError, match=rf"{latents}: .* base_sha256 \w+, wan\.vae={wan_folder} "):
        compare(latents, str(wan_folder), str(adapters))
    for name in ("base_sha256", "vae_sha256"):
        other = with_hash(latents, tmp_path / name, name)
        with pytest.raises(ShardError, match=rf"{other}: .*cached with {name} 000000000000, "):
            compare(other, TINY, str(adapters))
    base = json.loads((latents / MANIFEST).read_text())["base_sha256"]
    state = load_file(adapters)
    state["vae.merge.conv_out.weight"] = torch.ones_like(state["vae.merge.conv_out.weight"])
    facts = {"kind": '"rgba_vae"', "schema": "1", "base": '"x"', "base_sha256": json.dumps(base),
             "eps": "0",
             "merge_init": '"residual"', "lora_rank": "2", "lora_alpha": "2.0",
             "average_alpha": "true"}  # fmt: skip
    save_file(state, tmp_path / "other.safetensors", facts)
    save_file(state, tmp_path / "base.safetensors", facts | {"base_sha256": '"x"'})
    with pytest.raises(ShardError, match=r"base_sha256 .*, the base of rgba_vae=.* has x\."):
        compare(latents, TINY, str(tmp_path / "base.safetensors"))
    with pytest.raises(ShardError, match=r"vae_sha256 .*, rgba_vae=.*other\.safetensors has"):
        compare(latents, TINY, str(tmp_path / "other.safetensors"))


def test_what_is_not_there_is_named_with_the_way_to_have_it_compared(cached, tmp_path):
    latents, none = cached[0], str(tmp_path / "none")
    with pytest.warns(UserWarning, match=r"vae_sha256 \(.*To have it compared, give rgba_vae="):
        compare(latents, TINY, none)
    with pytest.warns(UserWarning, match=r"vae_sha256 \(rgba_vae=null\)"):
        compare(latents, TINY, None)
    with pytest.warns(
        UserWarning, match=r"base_sha256 \(.*none does not .*give wan\.vae=.* and rgba"
    ):
        compare(latents, none, None)


def test_without_the_base_its_adapters_tell(cached, tmp_path, recwarn):
    """They name their own base, whose hash is that of the cache."""
    latents, adapters = cached
    none = str(tmp_path / "none")
    compare(latents, none, str(adapters))
    assert not [warning for warning in recwarn if "not compared" in str(warning.message)]
    for name in ("base_sha256", "vae_sha256"):
        other = with_hash(latents, tmp_path / name, name)
        with pytest.raises(ShardError, match=rf"cached with {name} 000000000000, .*rgba_vae="):
            compare(other, none, str(adapters))
