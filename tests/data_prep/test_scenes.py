import json

import pytest

from acetate.commands.rules import RULES
from data_prep.scenes import KINDS, STRATA, SUBJECTS, scene


def facts_of(kind, seed, **changes):
    return scene(kind, seed, **({"frames": 5, "height": 32, "width": 32, "samples": 4} | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_the_facts(kind):
    first = facts_of(kind, 3)
    assert facts_of(kind, 3) == first == json.loads(json.dumps(first))
    larger = facts_of(kind, 3, frames=9, height=64, width=96)
    same = ("subject", "light", "camera", "prompt", "stratum")
    assert [larger[name] for name in same] == [first[name] for name in same]
    assert len({facts_of(kind, seed)["prompt"] for seed in range(20)}) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_name_what_the_facts_say(kind):
    for seed in range(60):
        facts = facts_of(kind, seed)
        subject, prompt = facts["subject"], facts["prompt"]
        names = ("color", "tint", "metal") if kind != "bubbles" else ()
        for name in names:
            assert name not in subject or subject[name] in prompt
        assert facts["camera"]["shot"] in prompt
        if facts["stratum"] != "glow":
            assert facts["light"]["tone"] in prompt and facts["light"]["from"] in prompt
        for name in ("wind", "way"):
            if name in subject:
                assert ("to the left" in prompt or "blown left" in prompt) == (subject[name] < 0)
        assert ("shadow" in prompt) == bool(subject.get("shadow"))
        assert " a orange" not in prompt and " a emerald" not in prompt


def test_every_stratum_is_reached():
    seen = {facts_of(kind, seed)["stratum"] for kind in KINDS for seed in range(12)}
    assert seen == set(STRATA)


def test_every_form_of_a_kind_is_reached():
    for kind, choice, count in (("objects", "shape", 10), ("glass", "shape", 7),
        ("hair", "style", 3), ("smoke", "style", 4), ("wires", "style", 4), ("flames", "style", 4),
        ("sparks", "style", 4), ("cloth", "style", 3), ("leaves", "thing", 3),
        ("liquid", "style", 3)):  # fmt: skip
        assert len({facts_of(kind, seed)["subject"][choice] for seed in range(150)}) == count


def test_the_settings_know_the_kinds():
    assert set(KINDS) == set(SUBJECTS)
    for kind in KINDS:
        assert RULES["render.kinds"].holds([kind])
    assert not RULES["render.kinds"].holds(["galss"])
    with pytest.raises(ValueError, match=r"kind='galss' cannot be rendered; known kinds: glass"):
        facts_of("galss", 0)
