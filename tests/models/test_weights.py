import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from acetate.models.loading import load_transformer, load_vae, renamed
from acetate.models.weights import assign, open_weights, read_weights
from tests.hostile import Hostile
from tests.original import original_transformer_state
from tests.processes import alone

LAYERS = 64
STEM = "diffusion_pytorch_model"


def write_shards(folder, state, parts=3):
    """Shards and the index that names them."""
    names = sorted(state)
    weight_map = {}
    for i in range(parts):
        file = f"{STEM}-{i + 1:05}-of-{parts:05}.safetensors"
        part = names[i::parts]
        save_file({name: state[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, weight_map


@pytest.fixture
def small(tmp_path):
    state = {f"layer{i}.weight": torch.randn(2, 3) for i in range(7)}
    return tmp_path, state, *write_shards(tmp_path, state)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_sharded_transformer(make_transformer, tmp_path, layout):
    """The 14B as it is downloaded, with a file beside it that its index does not name."""
    transformer = make_transformer()
    if layout == "original":
        state, config = (
            original_transformer_state(transformer),
            {"num_heads": 2, "_class_name": "WanModel"},
        )
    else:
        state, config = transformer.state_dict(), dict(transformer.config)
    write_shards(tmp_path, state)
    save_file(
        {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "t2v.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_transformer(str(tmp_path))
    for name, value in transformer.state_dict().items():
        assert_close(loaded.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_values_of_all_shards(small):
    folder, state, _, weight_map = small
    weights = open_weights(folder)
    assert {name: file.name for name, file in weights.files.items()} == weight_map
    assert all(value.is_meta for value in weights.meta.values())
    for name, value in read_weights(folder).items():
        assert_close(value, state[name], rtol=0, atol=0)


def test_index_that_names_a_file_that_is_not_there(small):
    folder, _, _, weight_map = small
    (folder / weight_map["layer1.weight"]).unlink()
    with pytest.raises(
        ValueError, match=rf"lacks {weight_map['layer1.weight']}, which {STEM}.*index.json names"
    ):
        open_weights(folder)


def test_index_against_its_files(small):
    folder, _, index, weight_map = small
    index.write_text(
        json.dumps({"weight_map": weight_map | {"layer9.weight": weight_map["layer0.weight"]}})
    )
    with pytest.raises(ValueError, match=r"-00001-of-00003.safetensors lacks layer9.weight, which"):
        open_weights(folder)
    moved = dict(weight_map)
    del moved["layer0.weight"]
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(
        ValueError,
        match=r"-00001-of-00003.safetensors holds layer0.weight, which .* does not place",
    ):
        open_weights(folder)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/weights.safetensors", 3])
def test_index_that_leaves_its_folder(small, file):
    folder, _, index, weight_map = small
    index.write_text(json.dumps({"weight_map": weight_map | {"layer0.weight": file}}))
    with pytest.raises(
        ValueError, match=r"index\.json: its weight_map must give a file of the same folder"
    ):
        open_weights(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_broken_index(small, text):
    folder, _, index, _ = small
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        open_weights(folder)


def test_two_indices(small):
    folder, _, index, _ = small
    index.with_name(f"{STEM}.fp16.safetensors.index.json").write_text(index.read_text())
    with pytest.raises(ValueError, match="keep one index, or name a file"):
        open_weights(folder)


def test_truncated_shard_is_named(small):
    folder, _, _, weight_map = small
    file = folder / weight_map["layer1.weight"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read"):
        open_weights(folder)


def test_folders_without_an_index(small):
    folder, state, index, weight_map = small
    index.unlink()
    assert open_weights(folder).meta.keys() == state.keys()  # all shards of one set
    save_file({"layer0.weight": torch.zeros(2, 3)}, folder / weight_map["layer1.weight"])
    with pytest.raises(
        ValueError, match=r"layer0\.weight: in .*-00001-of-.* and in .*-00002-of-.* too"
    ):
        open_weights(folder)
    save_file(state, folder / f"{STEM}.safetensors")
    # the standard name
    assert set(open_weights(folder).files.values()) == {folder / f"{STEM}.safetensors"}
    (folder / f"{STEM}.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(ValueError, match=r"holds .*mine\.safetensors, and no index. Name the file"):
        open_weights(folder)


@pytest.mark.parametrize("name", ["weights.gguf", "weights", "weights.json"])
def test_other_suffixes(tmp_path, name):
    (tmp_path / name).write_bytes(b"0")
    with pytest.raises(ValueError, match=r"a file of weights ends in \.safetensors, \.pth"):
        open_weights(tmp_path / name)


def test_state_dict_of_a_training_checkpoint(tmp_path):
    file = tmp_path / "last.ckpt"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, file
    )
    assert read_weights(file, wrapped=True).keys() == {"a"}
    with pytest.raises(
        ValueError, match=r"last\.ckpt holds state_dict, epoch, hyper_parameters: no tensor"
    ):
        read_weights(file)


def test_pickles_are_refused_by_name(tmp_path):
    """Neither run nor recommended to be run."""
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"a": torch.zeros(1), "encoder.conv1.weight": Hostile(tmp_path / "run")}, file)
    with pytest.raises(
        ValueError, match=r"it holds (posix|nt)\.mkdir, code rather than tensors"
    ) as error:
        open_weights(file)
    assert "weights_only" not in str(error.value)
    file.write_bytes(pickle.dumps(Hostile(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"cannot be read") as error:
        open_weights(file)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cut", [1, 30, 100, 400, 900, -30, -1])
def test_truncated_and_scrambled_pickles(tmp_path, cut):
    file = tmp_path / "weights.pth"
    torch.save({f"w{i}": torch.randn(9) for i in range(4)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read"):
        open_weights(file)


def test_one_tensor_under_two_names():
    with pytest.raises(
        ValueError, match=r"diffusion_model\.a and a are the same tensor under two names"
    ):
        renamed(["a", "diffusion_model.a"], lambda name: name.removeprefix("diffusion_model."))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(make_vae, tmp_path, dtype):
    make_vae("tiny").save_pretrained(tmp_path)
    file = tmp_path / f"{STEM}.safetensors"
    state = dict(read_weights(file))
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].to(dtype)
    save_file(state, file)
    with pytest.raises(
        ValueError,
        match=rf"{file.name} does not fit .*type: decoder\.conv_in\.weight is {str(dtype)[6:]}",
    ):
        load_vae(str(tmp_path))


def test_errors_name_the_shard(small):
    folder, *_ = small
    with torch.device("meta"):
        model = nn.ModuleDict(
            {f"layer{i}": nn.Linear(3, 2 + (i == 4), bias=False) for i in range(7)}
        )
    with pytest.raises(
        ValueError,
        match=r"layer4\.weight in .*-00002-of-00003\.safetensors is \(2, 3\), the model has",
    ):
        assign(
            model,
            open_weights(folder),
            {f"layer{i}.weight": f"layer{i}.weight" for i in range(7)},
            lambda _: None,
        )
    assert all(p.is_meta for p in model.parameters())


def test_same_type_is_mapped_and_another_is_converted(small):
    folder, state, *_ = small
    names = {name: name for name in state}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            model = nn.ModuleDict({f"layer{i}": nn.Linear(3, 2, bias=False) for i in range(7)})
        assign(model, open_weights(folder), names, lambda _, dtype=dtype: dtype)
        for name, value in model.state_dict().items():
            assert_close(value, state[name].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39])
def test_values_that_are_not_finite_are_named_with_their_file(small, value):
    """Also those that the wanted precision makes so."""
    folder, state, *_ = small
    state = {name: tensor.double() for name, tensor in state.items()}
    state["layer4.weight"][1, 2] = value
    write_shards(folder, state)
    with torch.device("meta"):
        model = nn.ModuleDict({f"layer{i}": nn.Linear(3, 2, bias=False) for i in range(7)})
    with pytest.raises(ValueError, match=r"-00002-of-00003\.safetensors: layer4\.weight has .*NaN"):
        assign(model, open_weights(folder), {name: name for name in state}, lambda _: torch.float32)
    assert all(p.is_meta for p in model.parameters())


def test_sums_beyond_half_precision_are_finite(tmp_path):
    save_file({"weight": torch.full((2, 64), 60000.0)}, tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = nn.Linear(64, 2, bias=False)
    weights = open_weights(tmp_path / "a.safetensors")
    assign(model, weights, {"weight": "weight"}, lambda _: torch.float16)
    assert model.weight.min() == 60000


def resident(line):
    """Bytes: VmRSS now, VmHWM the highest since clear_refs was written."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{line}:")[1].split()[0])


def peak_of_assigning(file, wanted):
    """By which memory grows at most, as a share of the weights."""
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(1024, 4096, bias=False) for _ in range(LAYERS)])
    Path("/proc/self/clear_refs").write_text("5")
    before, dtype = resident("VmRSS"), getattr(torch, wanted)
    weights = open_weights(file)
    assign(model, weights, {name: name for name in weights.meta}, lambda _: dtype)
    size = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        parameter.detach().sum()  # what is mapped is read now
    return (resident("VmHWM") - before) / size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_no_second_copy_in_memory(tmp_path, suffix, stored, wanted):
    """256 M parameters: 512 MiB or 1 GiB. Pages of the file count here as memory."""
    file = tmp_path / f"model{suffix}"
    state = {
        f"{i}.weight": torch.zeros(4096, 1024, dtype=getattr(torch, stored)) for i in range(LAYERS)
    }
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    del state
    assert 0.9 < alone(peak_of_assigning, file, wanted, within=300) < 1.2
