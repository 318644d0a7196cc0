import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch.testing import assert_close

from acetate.assembly import load_dit
from acetate.formats.few_step import merge_few_step
from acetate.formats.names import dit_name, original_dit_name
from acetate.formats.wan_alpha import dora_from_wan_alpha, dora_to_wan_alpha
from acetate.models.adapters import load_trainable
from acetate.models.dit import add_dora, merge_dora, velocity
from acetate.models.loading import load_transformer
from tests.paths import ROOT


@pytest.fixture
def adapted(golden, tmp_path):
    """The base with the file's adapters on it, in PEFT."""
    file = golden("dora")
    save_file(file.under("base"), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": file.metadata["num_heads"]}))
    transformer = load_transformer(str(tmp_path))
    add_dora(transformer, file.metadata["rank"], file.metadata["lora_alpha"])
    load_trainable(transformer, dora_from_wan_alpha(file.under("dora")), "dora")
    return file, transformer


def output(file, transformer):
    with torch.no_grad():
        return velocity(transformer, file["io/latents"], file["io/timestep"], file["io/context"])


def weights(transformer, file, prefix):
    state = transformer.state_dict()
    for key, expected in file.under(prefix).items():
        assert_close(state[dit_name(key)].view_as(expected), expected, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("training", [True, False])
def test_training_forward(adapted, training):
    file, transformer = adapted
    assert_close(
        output(file, transformer.train(training)), file["io/output_dora"], rtol=0, atol=1e-4
    )


def test_targets_are_the_released_ones(adapted):
    file, transformer = adapted
    ours = {
        name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name
    }
    assert ours == {
        dit_name(f"{layer}.weight").removesuffix(".weight") for layer in file.metadata["targets"]
    }


def test_released_file_comes_out_as_it_went_in(golden):
    file = golden("dora")
    released = file.under("dora")
    ours = dora_to_wan_alpha(
        dora_from_wan_alpha(released), file.metadata["lora_alpha"] / file.metadata["rank"]
    )
    assert ours.keys() == released.keys()
    for name, value in ours.items():
        assert_close(value, released[name].bfloat16(), rtol=0, atol=0, msg=name)
    base = file.under("base")
    assert {original_dit_name(dit_name(name)) for name in base} == base.keys()


def test_merged_weights_and_few_step_lora(adapted):
    file, transformer = adapted
    merge_dora(transformer, file.metadata["ratio"])
    weights(transformer, file, "merged")
    assert_close(output(file, transformer), file["io/output_dora"], rtol=0, atol=1e-4)
    changed = merge_few_step(
        transformer, file.under("lightx2v"), file.metadata["lightx2v_strength"]
    )
    assert changed == len(file.metadata["changed_by_lightx2v"])
    weights(transformer, file, "merged_lightx2v")
    assert_close(output(file, transformer), file["io/output_dora_lightx2v"], rtol=0, atol=1e-4)


def test_strength(adapted):
    file, transformer = adapted
    (prefix,) = {name.split("/")[0] for name in file.tensors if name.startswith("merged_ratio")}
    merge_dora(transformer, float(prefix.removeprefix("merged_ratio")))
    weights(transformer, file, prefix)


def test_two_timesteps_in_one_batch_are_the_two_alone(adapted):
    """The released training class mixes them in its head."""
    file, transformer = adapted
    x = torch.cat([file["io/latents"], file["io/latents"].flip(3)])
    t = torch.cat([file["io/timestep"], file["io/timestep"] / 3])
    context = file["io/context"].expand(2, -1, -1)
    with torch.no_grad():
        both = velocity(transformer, x, t, context)
        alone = [velocity(transformer, x[i : i + 1], t[i : i + 1], context[:1]) for i in range(2)]
    assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)


def few_step_only(file, folder):
    return [
        f"few_step.lora={folder}/few_step.safetensors",
        f"few_step.strength={file.metadata['lightx2v_strength']}",
    ]


@pytest.mark.parametrize(
    ("released", "expected"),
    [
        ((), "base"),
        (("dora",), "dora"),
        (("dora", "few"), "dora_lightx2v"),
        (("few",), "lightx2v_only"),
    ],
)
def test_released_files_through_the_sample_command(golden, tmp_path, released, expected):
    """Sharded base, t2v.safetensors and the few-step LoRA on top of it, as
    `acetate.commands.sample` loads them."""
    file = golden("dora")
    names = sorted(base := file.under("base"))
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: base[name] for name in part}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": file.metadata["num_heads"]}))
    save_file(file.under("dora"), tmp_path / "t2v.safetensors")
    save_file(file.under("lightx2v"), tmp_path / "few_step.safetensors")
    dora = [f"dora={tmp_path}/t2v.safetensors" if "dora" in released else "dora=null"]
    few = few_step_only(file, tmp_path) if "few" in released else []
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = [
            f"paths.root={ROOT}",
            f"wan.transformer={tmp_path}",
            "wan.dtype=float32",
            *dora,
            *few,
        ]
        config = compose("command/sample", overrides)
    transformer, _ = load_dit(config, "cpu")
    assert_close(output(file, transformer), file[f"io/output_{expected}"], rtol=0, atol=1e-4)
    if expected == "dora_lightx2v":
        weights(transformer, file, "merged_lightx2v")
