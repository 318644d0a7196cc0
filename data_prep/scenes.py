"""Draws what a rendered clip shows, as plain facts from a seed, and the prompt that these facts
make.

Blender is not needed here: `data_prep/in_blender` builds the scene that the facts tell. Space: the
subject lies around the origin, about 1 in radius; z is up. Time: seconds, at 16 frames each.
"""

from collections.abc import Callable, Mapping
from typing import Any

from acetate.data.drawing import FPS, Dice

Facts = dict[str, Any]
STRATA = ("opaque", "hair", "glass", "smoke", "glow", "effects")
TINTS = {
    "clear": "f2f8fa", "emerald": "1fb46a", "cobalt blue": "2450e0", "amber": "f29b1c",
    "ruby": "d81e3c", "violet": "8a3ee0", "turquoise": "1cc2c0", "pink": "f06aa8",
}  # fmt: skip
DRINKS = {"orange juice": "f58a0a", "milk": "f6f1e6", "red wine": "7a0c22", "green tea": "8fae2a",
    "blue lemonade": "2b7bf0", "cola": "3a1a0c"}  # fmt: skip
PAINTS = {"red": "d42a24", "blue": "2360d0", "green": "2a9a4a", "yellow": "f2c21c",
    "purple": "7d3ac0", "orange": "ee7a1a", "white": "ece9e2", "black": "1c1b20",
    "pink": "ec7fae", "teal": "1a9c9c"}  # fmt: skip
HAIRS = {"black": "16131a", "brown": "5a3420", "blond": "d8b066", "ginger": "b5521e",
    "silver": "b4b8c0", "white": "efebe4", "pink": "ea74a8", "blue": "3b62d8"}  # fmt: skip
SMOKES = {"white": "f4f4f2", "grey": "8c9098", "black": "1e1d22", "purple": "9a5ad8",
    "blue": "4a86e8", "orange": "f08a3a", "pink": "f080b4"}  # fmt: skip
FIRES = {"orange": ["ff5a0a", "ffc04a"], "blue": ["1a4cff", "7ac8ff"],
    "green": ["1ab03a", "b8ff7a"], "purple": ["7a1aff", "e08aff"]}  # fmt: skip
SPARKS = {"golden": "ffb030", "red": "ff3a20", "blue": "4a90ff", "green": "50ff6a",
    "silver": "dfe8ff", "violet": "b45aff"}  # fmt: skip
METALS = {"gold": "f0b840", "silver": "d8dade", "copper": "e0825a", "black iron": "3a3a40"}
LEAVES = {"green": "3f9a2e", "autumn red": "c8321e", "golden yellow": "eab02a", "brown": "7a4a20"}
LOOKS = {
    "vase": "vase", "goblet": "wine goblet", "bottle": "bottle", "sphere": "ball", "ring": "ring",
    "cube": "cube", "gem": "cut gem",
}  # fmt: skip
OBJECTS = {
    "torus": "ring", "gear": "gear wheel", "die": "die with pips", "star": "five-pointed star",
    "pawn": "chess pawn", "donut": "donut with sprinkles", "mug": "mug", "ball": "beach ball",
    "heart": "heart", "monkey": "monkey head",
}  # fmt: skip
SHEER = {"veil": "sheer veil", "flag": "flag", "scarf": "scarf"}
TONES = {
    "warm": ("ffe6c4", "c0b6ac"),
    "neutral": ("ffffff", "b8b8b8"),
    "cool": ("dce9ff", "acb6c4"),
}
SHOTS = {"close-up": (0.97, 1.06), "medium shot": (0.84, 0.93), "wide shot": (0.66, 0.78)}


def named(dice: Dice, options: Mapping[str, Any], name: str = "color") -> Facts:
    """Draws one of the options: its name, and its value as `code`."""
    chosen = dice.pick(list(options))
    return {name: chosen, f"{name}_code": options[chosen]}


def real(dice: Dice, low: float, high: float) -> float:
    return round(dice.real(low, high), 4)


def turning(speed: float) -> str:
    pace = "quickly" if abs(speed) > 70 else "slowly"
    return f"turning {pace} {'to the right' if speed > 0 else 'to the left'}"


def spin(dice: Dice) -> float:
    """Degrees a second."""
    return dice.pick((-1, 1)) * real(dice, 30, 110)


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def glass(dice: Dice) -> tuple[Facts, str]:
    shape, frosted = dice.pick(list(LOOKS)), dice.integer(0, 4) == 0
    facts = {"shape": shape, "frosted": frosted, "spin": spin(dice), "tilt": real(dice, -18, 18)}
    facts |= named(dice, TINTS, "tint") | {"depth": real(dice, 0.04, 0.14)}
    look = "frosted " if frosted else ""
    words = f"{look}{facts['tint']} glass {LOOKS[shape]}"
    return facts, f"{article(words)} {turning(facts['spin'])}"


def liquid(dice: Dice) -> tuple[Facts, str]:
    facts = {"style": dice.pick(("tumbler", "blob", "drops")), "rate": real(dice, 3, 7)}
    facts["swing"] = real(dice, 0.12, 0.3)
    if facts["style"] == "tumbler":
        facts |= named(dice, DRINKS, "tint") | {"level": real(dice, 0.1, 0.6)}
        return facts, f"{facts['tint']} sloshing in a glass tumbler"
    facts |= named(dice, TINTS, "tint")
    if facts["style"] == "blob":
        return facts, f"a wobbling blob of {facts['tint']} liquid, glossy and translucent"
    facts["count"] = dice.integer(7, 14)
    return facts, f"drops of {facts['tint']} liquid falling"


def hair(dice: Dice) -> tuple[Facts, str]:
    facts = {"style": dice.pick(("ball", "lock", "creature")), "wind": dice.pick((-1, 1))}
    facts |= named(dice, HAIRS) | {"length": real(dice, 0.35, 0.6), "curl": real(dice, 0, 1)}
    facts |= {"rate": real(dice, 3, 7), "strength": real(dice, 0.25, 0.6)}
    way = "to the left" if facts["wind"] < 0 else "to the right"
    curls = "curly" if facts["curl"] > 0.5 else "straight"
    subject = {
        "ball": f"a fluffy ball of {facts['color']} fur",
        "lock": f"a ponytail of {curls} {facts['color']} hair with a red band",
        "creature": f"a furry creature with big eyes and {facts['color']} fur",
    }[facts["style"]]
    return facts, f"{subject} blown {way} by the wind"


def smoke(dice: Dice) -> tuple[Facts, str]:
    style = dice.pick(("plume", "cloud", "ring", "cup"))
    facts = {"style": style, "rise": real(dice, 0.5, 1.1), "lean": real(dice, -0.35, 0.35)}
    facts |= {"density": real(dice, 5, 14), "detail": real(dice, 1.6, 2.6)}
    facts |= named(dice, {"white": SMOKES["white"]} if style == "cup" else SMOKES)
    pace = "quickly" if facts["rise"] > 0.8 else "slowly"
    if style == "cup":
        facts |= named(dice, PAINTS, "cup")
        return facts, f"white steam rising {pace} from {article(facts['cup'])} cup of hot coffee"
    subject = {
        "plume": f"a plume of {facts['color']} smoke rising {pace}",
        "cloud": f"a cloud of {facts['color']} smoke swirling {pace}",
        "ring": f"a ring of {facts['color']} smoke rolling {pace}",
    }[style]
    return facts, subject


def cloth(dice: Dice) -> tuple[Facts, str]:
    facts = {"style": dice.pick(list(SHEER)), "rate": real(dice, 3, 6), "wind": dice.pick((-1, 1))}
    facts |= named(dice, PAINTS) | named(dice, PAINTS, "second")
    facts |= {"folds": real(dice, 2, 4), "opacity": real(dice, 0.2, 0.4)}
    striped = facts["style"] != "veil" and facts["second"] != facts["color"]
    facts["pattern"] = dice.pick(("plain", "striped")) if striped else "plain"
    dyed = facts["color"]
    if facts["pattern"] == "striped":
        dyed = f"striped {dyed} and {facts['second']}"
    motion = "on its pole waving" if facts["style"] == "flag" else "floating"
    way = "to the left" if facts["wind"] < 0 else "to the right"
    return facts, f"{article(dyed)} {SHEER[facts['style']]} {motion} in the wind, blown {way}"


def leaves(dice: Dice) -> tuple[Facts, str]:
    thing = dice.pick(("leaf", "feather", "paper"))
    facts = {"thing": thing, "count": dice.integer(4, 9), "way": dice.pick((-1, 1))}
    facts |= {"speed": real(dice, 0.5, 1.3), "tumble": real(dice, 60, 260)}
    facts |= named(dice, LEAVES if thing == "leaf" else PAINTS)
    way = "to the left" if facts["way"] < 0 else "to the right"
    things = {"leaf": "leaves", "feather": "feathers", "paper": "sheets of paper"}[thing]
    pace = "whirling" if facts["tumble"] > 160 else "drifting"
    return facts, f"{facts['color']} {things} falling, {pace} {way}"


def bubbles(dice: Dice) -> tuple[Facts, str]:
    facts = {"count": dice.pick((1, 3, 5, 8, 12)), "rise": real(dice, 0.2, 0.5)}
    facts |= {"film": real(dice, 0, 1), "wobble": real(dice, 0.02, 0.07), "rate": real(dice, 5, 9)}
    if facts["count"] == 1:
        return facts, "one large iridescent soap bubble wobbling in the air"
    return facts, f"{facts['count']} iridescent soap bubbles floating upwards"


def wires(dice: Dice) -> tuple[Facts, str]:
    facts = {"style": dice.pick(("cage", "net", "coil", "tangle")), "spin": spin(dice)}
    facts |= named(dice, METALS, "metal") | {"thick": real(dice, 0.012, 0.025)}
    facts |= {"rate": real(dice, 3, 6), "rings": dice.integer(6, 11)}
    subject = {
        "cage": f"a round cage of {facts['metal']} wire {turning(facts['spin'])}",
        "net": f"a net of {facts['metal']} wire waving",
        "coil": f"a coil spring of {facts['metal']} wire stretching",
        "tangle": f"a tangled ball of {facts['metal']} wire {turning(facts['spin'])}",
    }[facts["style"]]
    return facts, subject


def flames(dice: Dice) -> tuple[Facts, str]:
    style = dice.pick(("flame", "candle", "campfire", "torch"))
    facts = {"style": style, "rise": real(dice, 0.9, 1.6), "lean": real(dice, -0.3, 0.3)}
    facts |= named(dice, FIRES) | {"height": real(dice, 0.85, 1.15)}
    way = "to the left" if facts["lean"] < -0.1 else "to the right" if facts["lean"] > 0.1 else ""
    subject = {
        "flame": f"a {facts['color']} flame", "candle": f"a candle with {facts['color']} flame",
        "campfire": f"a campfire of logs with {facts['color']} flames",
        "torch": f"a torch burning with {facts['color']} flame",
    }[style].replace("a orange", "an orange")  # fmt: skip
    return facts, f"{subject}, flickering {way or 'upwards'}"


def sparks(dice: Dice) -> tuple[Facts, str]:
    style = dice.pick(("burst", "fountain", "sparkler", "fireflies"))
    facts = {"style": style, "count": dice.integer(60, 140), "life": real(dice, 0.8, 1.3)}
    facts |= named(dice, SPARKS)
    subject = {
        "burst": f"a firework of {facts['color']} sparks bursting",
        "fountain": f"a fountain of {facts['color']} sparks",
        "sparkler": f"a sparkler throwing {facts['color']} sparks",
        "fireflies": f"{facts['color']} fireflies glowing and drifting",
    }[style]
    return facts, subject


def objects(dice: Dice) -> tuple[Facts, str]:
    shape = dice.pick(list(OBJECTS))
    facts = {
        "shape": shape,
        "finish": dice.pick(("glossy", "matt", "metallic")),
        "spin": spin(dice),
    }
    facts |= named(dice, PAINTS) | named(dice, PAINTS, "second")
    facts |= {"shadow": dice.integer(0, 1) == 1, "motion": dice.pick(("turning", "bouncing"))}
    facts |= {"rate": real(dice, 4, 7), "tilt": real(dice, -20, 20)}
    motion = turning(facts["spin"]) if facts["motion"] == "turning" else "bouncing up and down"
    words = f"{facts['finish']} {facts['color']} {OBJECTS[shape]}"
    return facts, f"{article(words)} {motion}{', with a soft shadow' if facts['shadow'] else ''}"


SUBJECTS: dict[str, Callable[[Dice], tuple[Facts, str]]] = {
    "glass": glass, "hair": hair, "smoke": smoke, "cloth": cloth, "leaves": leaves,
    "bubbles": bubbles, "wires": wires, "flames": flames, "sparks": sparks, "objects": objects,
    "liquid": liquid,
}  # fmt: skip
KINDS = tuple(SUBJECTS)


def stratum(kind: str, subject: Facts) -> str:
    """Returns which of STRATA a clip belongs to."""
    if kind == "objects":
        return "effects" if subject["shadow"] else "opaque"
    if kind == "cloth":
        return "effects" if subject["style"] == "veil" else "opaque"
    if kind == "leaves":
        return "hair" if subject["thing"] == "feather" else "opaque"
    return {"glass": "glass", "liquid": "glass", "bubbles": "glass", "hair": "hair",
        "wires": "hair", "smoke": "smoke", "flames": "glow", "sparks": "glow"}[kind]  # fmt: skip


def lighting(dice: Dice) -> tuple[Facts, str]:
    tone, side = dice.pick(list(TONES)), dice.pick(("left", "right", "above"))
    color, sky = TONES[tone]
    azimuth = {"left": -1, "right": 1, "above": 0.2}[side] * real(dice, 45, 75)
    elevation = real(dice, 65, 80) if side == "above" else real(dice, 20, 45)
    facts = {"tone": tone, "from": side, "color": color, "sky": sky,
        "azimuth": round(azimuth, 4), "elevation": elevation, "power": real(dice, 240, 400),
        "size": real(dice, 1.2, 3.0)}  # fmt: skip
    return facts, f"{tone} light from {'above' if side == 'above' else f'the {side}'}"


def filming(dice: Dice) -> Facts:
    shot = dice.pick(list(SHOTS))
    return {"shot": shot, "zoom": real(dice, *SHOTS[shot]), "azimuth": real(dice, -35, 35),
        "elevation": real(dice, 2, 24), "orbit": dice.pick((0, 0, 1)) * real(dice, -15, 15),
        "dolly": dice.pick((0, 0, 1)) * real(dice, -0.08, 0.08)}  # fmt: skip


def scene(kind: str, seed: int, frames: int, height: int, width: int, samples: int) -> Facts:
    """Draws the facts of a clip, deterministic in (kind, seed); another size or length shows the
    same subject, frame k at k/16 s. Raises ValueError for a kind that there is not."""
    if kind not in SUBJECTS:
        raise ValueError(f"kind={kind!r} cannot be rendered; known kinds: {', '.join(KINDS)}")
    dice = Dice("rendered", kind, seed)
    subject, words = SUBJECTS[kind](dice)
    light, lit = lighting(dice)
    camera = filming(dice)
    glows = stratum(kind, subject) == "glow"
    prompt = f"Transparent background, 3D render, {camera['shot']}: {words}"
    return {
        "kind": kind, "seed": seed % 2**31, "frames": frames, "height": height, "width": width,
        "fps": FPS, "samples": samples, "subject": subject, "light": light, "camera": camera,
        "stratum": stratum(kind, subject), "prompt": f"{prompt}{'' if glows else f', {lit}'}.",
    }  # fmt: skip
