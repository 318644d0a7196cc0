import json

import pytest

from data_prep.decisions import Decisions

DECISIONS = Decisions(
    color="straight", confidence=0.5, alpha_low=2, alpha_high=252, matte="normal", crop=(0, 4, 32,
    24),
    visible=(1, 2, 3, 4), still=False, cuts=(3, 9), reasons={"color": "measured"},
)  # fmt: skip


def test_json_holds_everything():
    text = json.dumps(DECISIONS.as_json())
    assert Decisions.of_json(json.loads(text)) == DECISIONS
    assert json.loads(text)["cuts"] == [3, 9]


def test_a_person_decides():
    chosen = DECISIONS.overridden(
        "the table", {"color": "True", "cuts": "5", "crop": "false", "still": "auto"}
    )
    assert (chosen.color, chosen.confidence, chosen.cuts, chosen.crop) == ("black", 1, (5,), None)
    assert chosen.still is False and chosen.alpha_low == 2
    assert chosen.reasons == dict.fromkeys(("color", "cuts", "crop"), "chosen by the table")
    assert DECISIONS.overridden("x", {"color": "", "alpha_low": "auto"}) is DECISIONS
    changed = DECISIONS.overridden(
        "x", {"crop": "1 2 3 4", "alpha_high": "240", "still": "true", "matte": "full"}
    )
    assert (changed.crop, changed.alpha_high, changed.still, changed.matte) == (
        (1, 2, 3, 4),
        240,
        True,
        "full",
    )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"color": "maybe"}, "color=maybe; straight, black, white, matte or a colour"),
        ({"still": "perhaps"}, "still=perhaps; true or false, or auto"),
        ({"crop": "1 2 3"}, "a rectangle is x, y >= 0 and width, height >= 1"),
        ({"cuts": "4 2"}, r"cuts=\[4, 2\]; first frames of the later shots, rising from 1"),
        ({"alpha_low": "253"}, "0 <= alpha_low < alpha_high <= 255"),
        ({"visible": "1 2 3 4"}, "visible cannot be chosen; known: color"),
    ],
)
def test_impossible_choices_are_named(choices, message):
    with pytest.raises(ValueError, match=message):
        DECISIONS.overridden("the table", choices)


def test_older_lines_spell_colour():
    line = json.loads(json.dumps(DECISIONS.as_json()).replace("color", "colour"))
    assert "colour" in line["reasons"] and Decisions.of_json(line) == DECISIONS


def test_edited_lines_are_checked():
    line = DECISIONS.as_json()
    with pytest.raises(ValueError, match="decisions: color, hue unknown or missing"):
        Decisions.of_json({**{k: v for k, v in line.items() if k != "color"}, "hue": "black"})
    with pytest.raises(ValueError, match=r"confidence=2; must be in \[0, 1\]"):
        Decisions.of_json({**line, "confidence": 2})
