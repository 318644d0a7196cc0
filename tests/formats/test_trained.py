"""Damaged checkpoints are found out without the base that they were trained on, whatever they are
exported to."""

import json

import pytest
import torch
from safetensors.torch import save_file

from acetate.formats.checkpoints import read_trained
from acetate.formats.trained import check_facts, check_trained
from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
from acetate.models.dit import add_dora
from acetate.models.rgba_vae import RGBAVAE

DORA = {"base": "b", "transformer_sha256": "0", "rank": 3, "alpha": 6, "mean_shift": 0.05}
VAE = {"base": "b", "base_sha256": "0", "merge_init": "residual", "lora_rank": 2, "lora_alpha": 2.0,
       "average_alpha": True}  # fmt: skip
Q = "blocks.1.attn1.to_q"
LORA = "decoder_alpha.net.up_blocks.0.resnets.0.conv1.parametrizations.weight.0"


@pytest.fixture
def dora(make_transformer):
    transformer = make_transformer()
    add_dora(transformer, 3, 6)
    return {name: value.detach() for name, value in trainable_state(transformer).items()}


@pytest.fixture(scope="module")
def whole_vae(make_vae):
    vae = RGBAVAE(vae=make_vae("tiny"), merge_init="residual", lora_rank=2, lora_alpha=2.0)
    return {name: value.detach() for name, value in trainable_state(vae).items()}


def only_some(state):
    for name in list(state)[7:]:
        del state[name]


def renamed(old, new):
    def change(state):
        state[new] = state.pop(old)

    return change


def replaced(name, value):
    return lambda state: state.update({name: value(state[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            only_some,
            r"file is no whole dit_dora: 23 missing: blocks\.0\..*\. It is damaged: give another",
        ),
        (lambda state: state.clear(), r"30 missing"),
        (
            lambda state: state.pop(f"{Q}.lora_B.default.weight"),
            rf"1 missing: {Q}\.lora_B\.default\.weight\. It",
        ),
        (
            replaced(f"{Q}.lora_A.default.weight", lambda a: a[:2]),
            rf"{Q}\.lora_A.* is \(2, 24\), the model has \(3, ",
        ),
        (
            replaced(f"{Q}.lora_B.default.weight", lambda b: b.T),
            rf"{Q}\.lora_B.* is \(3, 24\), the model has \(3, 3",
        ),
        (replaced(f"{Q}.lora_A.default.weight", lambda a: a[0, 0]), rf"{Q}\.lora_A.* is \(\)"),
        (
            replaced(f"{Q}.lora_magnitude_vector.default.weight", lambda m: m.to(torch.int8)),
            rf"1 of another type: {Q}\.lora_magnitude_vector\.default\.weight is int8",
        ),
        (lambda state: state.update({"text.weight": torch.ones(1)}), r"1 not used: text\.weight"),
        (
            renamed(f"{Q}.lora_A.default.weight", "blocks.1.attn1.norm_q.lora_A.default.weight"),
            r"not used: .*norm_q",
        ),
        (
            lambda state: [
                renamed(name, name.replace("s.1.", "s.7."))(state)
                for name in list(state)
                if "s.1." in name
            ],
            r"30 missing: blocks\.1\.",
        ),
    ],
)
def test_damaged_dora(tmp_path, dora, change, message):
    check_trained(tmp_path / "file", "dit_dora", dora, DORA)
    change(dora)
    with pytest.raises(ValueError, match=message):
        check_trained(tmp_path / "file", "dit_dora", dora, DORA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_some, r"file is no whole rgba_vae: \d+ missing: merge\."),
        (lambda state: state.clear(), "missing: merge"),
        (lambda state: state.pop(f"{LORA}.B"), rf"1 missing: {LORA}\.B"),
        (
            lambda state: [state.pop(f"{LORA}.{matrix}") for matrix in "AB"],
            rf"2 missing: {LORA}\.A, {LORA}\.B",
        ),
        (replaced(f"{LORA}.A", lambda a: torch.cat([a, a])), rf"{LORA}\.A is \(4, "),
        (replaced(f"{LORA}.A", lambda a: a[0, 0, 0, 0, 0]), rf"{LORA}\.A is \(\)"),
        (
            replaced("merge.conv_in.weight", lambda a: a.to(torch.int8)),
            r"merge\.conv_in\.weight is int8",
        ),
        (
            replaced("merge.norm_out.gamma", lambda a: a[:1]),
            r"merge\.norm_out\.gamma is \(1, 1, 1, 1\)",
        ),
        (
            lambda state: state.update({"encoder.weight": torch.ones(1)}),
            r"1 not used: encoder\.weight",
        ),
        (renamed(f"{LORA}.A", LORA.replace("conv1", "conv9") + ".A"), r"not used: .*conv9"),
    ],
)
def test_damaged_rgba_vae(tmp_path, whole_vae, change, message):
    check_trained(tmp_path / "file", "rgba_vae", whole_vae, VAE)
    state = dict(whole_vae)
    change(state)
    with pytest.raises(ValueError, match=message):
        check_trained(tmp_path / "file", "rgba_vae", state, VAE)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dit_dora", {"rank": None}, "file: its metadata has rank=None"),
        ("dit_dora", {"rank": 0}, "rank=0"),
        ("dit_dora", {"rank": True, "alpha": "6"}, "rank=True.*alpha='6'"),
        ("rgba_vae", {"merge_init": "other"}, "merge_init='other'"),
        ("rgba_vae", {"average_alpha": 1}, "average_alpha=1"),
    ],
)
def test_facts(tmp_path, kind, change, message):
    facts = {"dit_dora": DORA, "rgba_vae": VAE}[kind]
    check_facts(tmp_path / "file", kind, facts)
    with pytest.raises(ValueError, match=message):
        check_facts(tmp_path / "file", kind, facts | change)
    for name in facts:
        with pytest.raises(ValueError, match=rf"file: its metadata has no {name}\. "):
            check_facts(
                tmp_path / "file", kind, {other: facts[other] for other in facts if other != name}
            )


def test_adapter_files_are_checked(tmp_path, dora):
    only_some(dora)
    facts = {**DORA, "schema": ADAPTER_SCHEMA, "kind": "dit_dora"}
    state = {f"transformer.{name}": value for name, value in dora.items()}
    save_file(
        state,
        tmp_path / "cut.safetensors",
        {name: json.dumps(value) for name, value in facts.items()},
    )
    with pytest.raises(ValueError, match=r"cut\.safetensors is no whole dit_dora"):
        read_trained(str(tmp_path / "cut.safetensors"))
