"""What a file says of its size, rank, layers and values is held against the file itself."""

import json
import shutil
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from acetate.formats.checkpoints import read_trained
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.formats.trained import read_whole_adapters
from acetate.models.loading import load_transformer, load_vae
from acetate.models.text import load_umt5
from acetate.models.weights import load_data
from tests.conftest import TINY


def edited(file, out, spoil=lambda state: None, **facts):
    with safe_open(file, "pt") as held:
        state = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        metadata = held.metadata()
    spoil(state)
    save_file(state, out, metadata | facts)
    return str(out)


def nan(state):
    next(iter(state.values())).view(-1)[0] = float("nan")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "facts, spoil, said",
    [
        *(({"rank": value, "lora_rank": value}, None, said) for value, said in (
            ("1000000000", r"rank=1000000000: must be a whole number"), ("null", "rank=None"),
            ("60000", "of another shape"), ('"x"', "rank='x'"), ("[" * 5000, "nested too deeply"))),
        ({"alpha": "NaN", "lora_alpha": "NaN"}, None, "NaN is no number"),
        *(({"alpha": value, "lora_alpha": value}, None, r"alpha=.*: must be a number at .*0")
          for value in ("1e300", "-3")),
        ({}, nan, "values that are not finite"),
    ],
)  # fmt: skip
def test_adapters(cached, dora, tmp_path, facts, spoil, said):
    spoil = spoil or (lambda state: None)
    file = edited(dora, tmp_path / "dora.safetensors", spoil, **facts)
    for read in (read_trained, lambda source: read_whole_adapters(source, "dit_dora")):
        with pytest.raises(ValueError, match=rf"dora\.safetensors.*{said}"):
            read(file)
    file = edited(cached[1], tmp_path / "vae.safetensors", spoil, **facts)
    for read in (read_trained, lambda source: load_rgba_vae(vae=TINY, adapters=source)):
        with pytest.raises(ValueError, match=rf"vae\.safetensors.*{said}"):
            read(file)


def test_files_that_claim_more_than_they_hold(tmp_path):
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read \(a tensor of .*1000000, 1000000"):
        load_data(tmp_path / "a.pt")
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "b.pt")
    with (
        zipfile.ZipFile(tmp_path / "b.pt") as old,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"c\.pt cannot be read \(its members are compressed"):
        load_data(tmp_path / "c.pt")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "part, change",
    [
        ("vae", {"num_res_blocks": 10**6}), ("vae", {"dim_mult": "x"}), ("vae", {"z_dim": None}),
        ("vae", {"temperal_downsample": [True] * 9}), ("vae", {"latents_std": [0] * 16}),
        ("vae", {"base_dim": 1.5}), ("vae", {"dim_mult": []}),
        ("transformer", {"num_layers": 10**6}),
        ("transformer", {"num_layers": 4000}), ("transformer", {"patch_size": 2}),
        ("transformer", {"attention_head_dim": 1024}), ("transformer", {"rope_max_seq_len": 10**9}),
        ("transformer", {"eps": "x"}), ("transformer", {"qk_norm": "x"}),
        ("text_encoder", {"num_layers": 10**6}), ("text_encoder", {"d_model": None}),
        ("text_encoder", {"dense_act_fn": 5}), ("text_encoder", {"dtype": "float7"}),
    ],
)  # fmt: skip
def test_configs(tmp_path, part, change):
    shutil.copytree(f"{TINY}/{part}", tmp_path / part)
    file = tmp_path / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    load = {"vae": load_vae, "transformer": load_transformer,
            "text_encoder": lambda source: load_umt5(tmp_path / part)}[part]  # fmt: skip
    ((name, _),) = change.items()
    with pytest.raises(ValueError, match=rf"{part}/config\.json: .*{name}=.*: must"):
        load(str(tmp_path))
