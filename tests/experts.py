"""A base with two experts, of which the second is not the first, and adapters of both."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
from acetate.models.dit import add_dora
from acetate.models.loading import load_transformer, transformer_sha256
from tests.conftest import TINY

BOUNDARY = 0.875


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    """The tiny base in the layout of Wan2.2's A14B; the low-noise expert's last layer is weaker."""
    folder = tmp_path_factory.mktemp("two")
    for part in ("vae", "transformer", "text_encoder", "tokenizer"):
        os.symlink(f"{TINY}/{part}", folder / part)
    low = load_transformer(TINY)
    with torch.no_grad():
        low.proj_out.weight.mul_(0.9)
    low.save_pretrained(folder / "transformer_2")
    return folder


def of_two(folder):
    """Settings that choose such a base."""
    parts = ("vae", "transformer", "transformer_2", "text_encoder")
    return [*(f"wan.{part}={folder}" for part in parts), f"wan.boundary={BOUNDARY}"]


@pytest.fixture(scope="session")
def doras(two_experts, tmp_path_factory):
    """A file of random adapters for each expert, as two runs write them."""
    folder, files = tmp_path_factory.mktemp("doras"), {}
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        transformer = load_transformer(str(two_experts), part=part)
        facts = {
            "schema": ADAPTER_SCHEMA, "kind": "dit_dora", "base": str(two_experts), "rank": 2,
            "alpha": 2, "mean_shift": 0.5, "expert": expert, "boundary": BOUNDARY,
            "transformer_sha256": transformer_sha256(transformer), "averaged": False, "step": 1,
        }  # fmt: skip
        add_dora(transformer, 2, 2)
        torch.manual_seed(len(expert))
        for parameter in trainable_state(transformer).values():
            torch.nn.init.normal_(parameter, std=0.1)
        state = {
            f"transformer.{name}": value.detach().contiguous()
            for name, value in trainable_state(transformer).items()
        }
        files[expert] = folder / f"{expert}.safetensors"
        save_file(state, files[expert], {name: json.dumps(value) for name, value in facts.items()})
    return files
