import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from acetate.models.text import embed_prompt, prompt_cache


def test_prompt_embedding(wan_folder, tmp_path):
    """Embeddings of the prompt's own tokens, then zeros, as Wan's DiT was trained."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    embeds = embed_prompt("a red disc", str(wan_folder), 40, str(tmp_path))
    tokens = AutoTokenizer.from_pretrained(wan_folder / "tokenizer")("a red disc", return_tensors="pt")
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
    from transformers import UMT5EncoderModel

    loads = []
    load = UMT5EncoderModel.from_pretrained

    def counted(*args, **kwargs):
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", counted)
    cache = str(tmp_path / "new" / "cache")
    first = embed_prompt("smoke", str(wan_folder), 20, cache)
    assert_close(embed_prompt("smoke", str(wan_folder), 20, cache), first, rtol=0, atol=0)
    assert len(loads) == 1
    other = embed_prompt("", str(wan_folder), 20, cache)
    assert len(loads) == 2
    assert (other - first).abs().max() > 0.01
    assert embed_prompt("smoke", str(wan_folder), 24, cache).shape[1] == 24
    assert not list((tmp_path / "new" / "cache").glob("*.tmp"))


def test_prompt_that_is_too_long(wan_folder, tmp_path):
    with pytest.raises(ValueError, match=r"A prompt of \d+ tokens; this model reads 3. Shorten: 'smoke over"):
        embed_prompt("smoke over a blue sea", str(wan_folder), 3, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_prompt_cache_follows_its_text_encoder(wan_folder, tmp_path):
    """A folder that is trained anew under the same name gives new embeddings."""
    source = tmp_path / "wan"
    shutil.copytree(wan_folder, source)
    first = embed_prompt("smoke", str(source), 20, str(tmp_path / "cache"))
    weights = source / "text_encoder" / "model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    second = embed_prompt("smoke", str(source), 20, str(tmp_path / "cache"))
    assert (first - second).abs().max() > 0.01


def test_prompt_cache_names():
    names = {
        prompt_cache(*key, "cache")
        for key in [("a", "wan", 8), ("b", "wan", 8), ("a", "other", 8), ("a", "wan", 9), ("", "wan", 8)]
    }
    assert len(names) == 5
    assert prompt_cache("a", "wan", 8, "cache") in names


def test_text_encoder_of_the_original_release(tmp_path):
    (tmp_path / "google").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no folder tokenizer/\. UMT5 is read in diffusers layout"):
        embed_prompt("smoke", str(tmp_path), 8, str(tmp_path / "cache"))
