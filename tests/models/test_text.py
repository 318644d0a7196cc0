import math
import shutil

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from acetate.models import text
from acetate.models.text import TextEncoder, embed_prompt, load_umt5, prompt_cache
from tests.original import original_umt5_state


def test_prompt_embedding(wan_folder, tmp_path):
    """Embeddings of the prompt's own tokens, then zeros, as Wan's DiT was trained."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    embeds = embed_prompt("a red disc", str(wan_folder), 40, str(tmp_path))
    tokens = AutoTokenizer.from_pretrained(wan_folder / "tokenizer")(
        "a red disc", return_tensors="pt"
    )
    count = tokens.input_ids.shape[1]
    assert tokens.input_ids[0, -1] == 1  # </s>
    encoder = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder")
    with torch.no_grad():
        expected = encoder(**tokens.data).last_hidden_state
    assert embeds.shape == (1, 40, 16)
    assert embeds.dtype == torch.float32
    assert_close(embeds[:, :count], expected, rtol=0, atol=1e-6)
    assert embeds[:, :count].abs().amax(-1).min() > 0
    assert embeds[:, count:].abs().max() == 0


def test_prompt_is_embedded_once(wan_folder, tmp_path, monkeypatch):
    loads = []
    load = text.load_umt5
    monkeypatch.setattr(text, "load_umt5", lambda *args: loads.append(args) or load(*args))
    cache = str(tmp_path / "new" / "cache")
    first = embed_prompt("smoke", str(wan_folder), 20, cache)
    assert_close(embed_prompt("smoke", str(wan_folder), 20, cache), first, rtol=0, atol=0)
    assert len(loads) == 1
    other = embed_prompt("", str(wan_folder), 20, cache)
    assert len(loads) == 2
    assert (other - first).abs().max() > 0.01
    assert embed_prompt("smoke", str(wan_folder), 24, cache).shape[1] == 24
    assert not list((tmp_path / "new" / "cache").glob("*.tmp"))


def test_prompts_are_cleaned_as_wan_does(wan_folder):
    text = TextEncoder(str(wan_folder), 64)
    assert_close(
        text("  a red\n disc &amp;amp; smoke "), text("a red disc & smoke"), rtol=0, atol=0
    )
    for prompt in ("“a” red\n disc &amp; smoke", "the ﬂame of a candle  "):
        assert_close(text(prompt), text(prompt_clean(prompt)), rtol=0, atol=0)
    assert text("a red disc").shape != text("a red disc & smoke").shape


def test_prompt_that_is_too_long(wan_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"A prompt of \d+ tokens; this model reads 3. Shorten: 'smoke over"
    ):
        embed_prompt("smoke over a blue sea", str(wan_folder), 3, str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


def test_prompt_cache_follows_its_text_encoder(wan_folder, tmp_path):
    """A folder that is trained anew under the same name gives new embeddings."""
    source = tmp_path / "wan"
    shutil.copytree(wan_folder, source)
    first = embed_prompt("smoke", str(source), 20, str(tmp_path / "cache"))
    weights = source / "text_encoder" / "model.safetensors"
    save_file(
        {name: value + 0.1 for name, value in load_file(weights).items()}, weights, {"format": "pt"}
    )
    second = embed_prompt("smoke", str(source), 20, str(tmp_path / "cache"))
    assert (first - second).abs().max() > 0.01


def test_prompt_cache_names():
    names = {
        prompt_cache(*key, "cache")
        for key in [
            ("a", "wan", 8),
            ("b", "wan", 8),
            ("a", "other", 8),
            ("a", "wan", 9),
            ("", "wan", 8),
        ]
    }
    assert len(names) == 5
    assert prompt_cache("a", "wan", 8, "cache") in names


def wan_forward(state, ids, heads):
    """The encoder as Wan's own code runs it: no scaling, a position bias in every block, gated GELU
    (tanh)."""

    def norm(x, gain):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain

    def position_bias(weight, length):
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        buckets, exact = weight.shape[0] // 2, weight.shape[0] // 4
        far = (
            exact
            + (torch.log(distance.abs() / exact) / math.log(128 / exact) * (buckets - exact)).long()
        )
        far = far.clamp(max=buckets - 1)
        place = (distance > 0) * buckets + torch.where(distance.abs() < exact, distance.abs(), far)
        return weight[place].permute(2, 0, 1)

    x = state["token_embedding.weight"][ids]
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for n in range(count):
        w = {
            k.removeprefix(f"blocks.{n}.").removesuffix(".weight"): v
            for k, v in state.items()
            if f"blocks.{n}." in k
        }
        y = norm(x, w["norm1"])
        q, k, v = (
            (y @ w[f"attn.{part}"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qkv"
        )
        scores = q @ k.transpose(1, 2) + position_bias(w["pos_embedding.embedding"], len(ids))
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w["attn.o"].T
        y = norm(x, w["norm2"])
        gate = nn.functional.gelu(y @ w["ffn.gate.0"].T, approximate="tanh")
        x = x + (gate * (y @ w["ffn.fc1"].T)) @ w["ffn.fc2"].T
    return norm(x, state["norm.weight"])


@pytest.fixture
def original(wan_folder, tmp_path):
    """The original release's folder: UMT5's file and google/umt5-xxl."""
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder")
    torch.save(original_umt5_state(model), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(wan_folder / "tokenizer", tmp_path / "google/umt5-xxl")
    return tmp_path


def test_names_are_wans_own(original):
    state = torch.load(original / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    block = {name.removeprefix("blocks.1.") for name in state if name.startswith("blocks.1.")}
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding", "norm1", "norm2")
    assert block == {f"{part}.weight" for part in (*parts, "ffn.gate.0", "ffn.fc1", "ffn.fc2")}
    rest = {name for name in state if not name.startswith("blocks.")}
    assert rest == {"token_embedding.weight", "norm.weight"}


@pytest.mark.parametrize("file", ["", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_text_encoder_of_the_original_release(original, wan_folder, file):
    encoder, same = TextEncoder(str(original / file), 40), TextEncoder(str(wan_folder), 40)
    prompt = " ".join(["a red disc, smoke over a blue sea"] * 16)  # long enough for the far buckets
    encoder.length = same.length = 400
    assert_close(encoder(prompt), same(prompt), rtol=0, atol=1e-6)
    assert encoder.sha256() == same.sha256()
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight
    state = torch.load(original / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    ids = encoder.tokenizer(prompt, return_tensors="pt").input_ids[0]
    assert len(ids) > 130
    assert_close(encoder(prompt), wan_forward(state, ids, heads=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision_is_as_in_transformers(wan_folder, tmp_path, dtype):
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    for given in ("auto", "bfloat16"):
        expected = UMT5EncoderModel.from_pretrained(tmp_path, dtype=given)
        ours = load_umt5(tmp_path, None if given == "auto" else torch.bfloat16)
        for name, value in expected.state_dict().items():
            assert_close(ours.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_umt5_that_does_not_fit(original):
    file = original / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(file, weights_only=True)
    state["blocks.1.attn.gate.weight"] = state.pop("blocks.1.attn.o.weight")
    state["norm.weight"] = torch.zeros(7)
    torch.save(state, file)
    with pytest.raises(
        ValueError, match=r"bf16\.pth does not fit the model: .*not used: blocks\.1\.attn\.gate"
    ) as error:
        load_umt5(file)
    assert "1 missing: encoder.block.1.layer.0.SelfAttention.o.weight" in str(error.value)
    assert "norm.weight is (7,), the model has (16,)" in str(error.value)


def test_source_without_text_encoder(original, tmp_path):
    shutil.rmtree(original / "google")
    with pytest.raises(
        FileNotFoundError,
        match=r"umt5-xxl does not exist; models_t5.* needs its tokenizer beside it",
    ):
        embed_prompt("smoke", str(original), 8, str(tmp_path / "cache"))
    (original / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no folder tokenizer/, and no models_t5\*\.pth"
    ):
        embed_prompt("smoke", str(original), 8, str(tmp_path / "cache"))


def test_prompt_cache_follows_the_original_file(original):
    first = prompt_cache("a", str(original), 8, "cache")
    with (original / "models_t5_umt5-xxl-enc-bf16.pth").open("ab") as file:
        file.write(b"more")
    assert prompt_cache("a", str(original), 8, "cache") != first
