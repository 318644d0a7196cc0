"""On tiny random models of real architectures: what they say is noise, how they are asked is
not."""

import numpy as np
import pytest
import torch

from data_prep.captioner import Captioner, Look, composite, sheet
from tests.data_prep.tiny_captioners import save_blip, save_llava


def clip(frames=5, height=12, width=20):
    made = np.zeros((frames, height, width, 4), np.uint8)
    made[..., 0] = np.arange(frames)[:, None, None] * 40
    made[:, :, :10, 3] = 255
    return made


def test_composites():
    grey, checker = (
        np.asarray(composite(clip()[4], ground)) for ground in ("grey", "checkerboard")
    )
    assert grey.shape == (12, 20, 3) and grey[0, 0].tolist() == checker[0, 0].tolist() == [
        160,
        0,
        0,
    ]
    assert grey[0, 19].tolist() == [128, 128, 128] and set(
        checker[:, 10:].reshape(-1).tolist()
    ) == {153, 204}


def test_what_is_shown():
    several = Look(3, "several", "grey").of(clip())
    assert [np.asarray(image)[0, 0, 0] for image in several] == [0, 80, 160]
    assert len(Look(8, "several", "grey").of(clip(2))) == 2
    (whole,) = Look(5, "sheet", "grey").of(clip())
    assert whole.size == (3 * 20, 2 * 12)
    assert np.asarray(whole)[12, [0, 20]].tolist() == [[120, 0, 0], [160, 0, 0]]
    assert sheet(several[:1]).size == (20, 12)


def captioner(folder, **changes):
    settings = {
        "instruction": "describe a star",
        "look": Look(3, "several", "grey"),
        "max_tokens": 5,
    }
    return Captioner(str(folder), **(settings | changes), dtype="float32", device="cpu")


@pytest.mark.slow
def test_a_model_that_chats_sees_every_picture(tmp_path, monkeypatch):
    save_llava(tmp_path)
    teller, seen = captioner(tmp_path), []
    generate = teller.model.generate
    monkeypatch.setattr(
        teller.model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs)
    )
    said = teller(clip())
    assert said and said == teller(clip()) and "\n" not in said
    assert seen[0]["pixel_values"].shape == (3, 3, 16, 16)
    words = teller.processor.tokenizer.convert_ids_to_tokens(seen[0]["input_ids"][0])
    assert words == ["<image>"] * 12 + ["describe", "a", "star"]
    teller.look = Look(3, "sheet", "grey")
    seen.clear()
    teller(clip())
    assert seen[0]["pixel_values"].shape == (1, 3, 16, 16)
    # the most likely token is now the first, padding
    torch.nn.init.zeros_(teller.model.lm_head.weight)
    with pytest.raises(ValueError, match="the captioner said nothing"):
        teller(clip())


@pytest.mark.slow
def test_a_model_that_only_captions_sees_one_sheet(tmp_path):
    save_blip(tmp_path)
    teller = captioner(tmp_path)
    assert teller.look.images == "sheet"
    assert teller(clip()) == teller(clip())
