"""Smoke and steam, flames, sparks: volumes of noise, and light that covers nothing."""

import math
from typing import Any

import numpy as np
from nodes import add, clock, glowing, linear, material, output, principled, ramp, scaled
from nodes import math as computed
from shapes import lathe, placed, primitive, restrand, set_radius, strands
from stage import Update, move

import bpy  # isort: skip


def domain(made: Any, size: tuple[float, float, float], middle: float = 0.0) -> Any:
    box = primitive("cube", made, smooth=False, size=2.0, location=(0, 0, middle))
    box.scale = size
    return box


def axes_of(tree: Any) -> tuple[Any, Any, Any, Any]:
    """Returns world coordinates: the vector, x, y, z."""
    place = add(tree, "ShaderNodeNewGeometry").outputs["Position"]
    x, y, z = add(tree, "ShaderNodeSeparateXYZ", {0: place}).outputs
    return place, x, y, z


def rising(tree: Any, place: Any, rate: float, fps: float, scale: float, seed: int) -> Any:
    """Returns noise in [0, 1] that moves up with `rate` units a second and changes on its way."""
    low = computed(tree, "MULTIPLY", clock(tree, rate, fps), -1.0)
    shift = add(tree, "ShaderNodeCombineXYZ", {0: seed % 97 * 1.7, 2: low}).outputs[0]
    moved = add(tree, "ShaderNodeVectorMath", {0: place, 1: shift}, operation="ADD").outputs[0]
    noise = add(tree, "ShaderNodeTexNoise", {"Vector": moved, "W": clock(tree, 0.5, fps),
        "Scale": scale, "Detail": 3.0, "Roughness": 0.55}, noise_dimensions="4D")  # fmt: skip
    return noise.outputs[0]


def around_axis(tree: Any, x: Any, y: Any, z: Any, lean: float, base: float) -> Any:
    """Returns the distance from an axis that leaves z = base upwards and leans more and more to the
    side."""
    up = computed(tree, "MAXIMUM", computed(tree, "SUBTRACT", z, base), 0.0)
    off = computed(tree, "MULTIPLY", computed(tree, "MULTIPLY", up, up), 0.35 * lean)
    dx = computed(tree, "SUBTRACT", x, off)
    return computed(tree, "SQRT", computed(tree, "ADD", computed(tree, "MULTIPLY", dx, dx),
        computed(tree, "MULTIPLY", y, y)))  # fmt: skip


def smoke(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    style, cup = subject["style"], subject["style"] == "cup"
    base = -0.35 if cup else -1.05
    made, tree = material("smoke")
    place, x, y, z = axes_of(tree)
    grain = rising(tree, place, subject["rise"], facts["fps"], subject["detail"], facts["seed"])
    fine = rising(tree, place, 1.2 * subject["rise"], facts["fps"], 2.2 * subject["detail"],
        facts["seed"] + 31)  # fmt: skip
    grain = computed(tree, "ADD", computed(tree, "MULTIPLY", grain, 0.65),
        computed(tree, "MULTIPLY", fine, 0.35))  # fmt: skip
    if style in ("plume", "cup"):
        far = around_axis(tree, x, y, z, subject["lean"], base)
        up = computed(tree, "SUBTRACT", z, base)
        start, grow = (0.2, 0.18) if cup else (0.12, 0.27)
        wide = computed(tree, "MULTIPLY_ADD", up, grow, start)
        body = computed(tree, "SUBTRACT", 1.0, computed(tree, "DIVIDE", far, wide))
        ends = computed(tree, "MULTIPLY", scaled(tree, up, (0.0, 0.15, 0.0, 1.0)),
            scaled(tree, z, (0.7, 1.15, 1.0, 0.0)))  # fmt: skip
        worn = scaled(tree, z, (-0.2, 1.15, 0.0, 1.3), smooth=False)  # ragged towards its top
        body = computed(tree, "SUBTRACT", body, worn)
        body = computed(tree, "MULTIPLY_ADD", computed(tree, "SUBTRACT", grain, 0.5), 3.4, body)
        cloudy = computed(tree, "MULTIPLY", scaled(tree, body, (0.0, 0.7, 0.0, 1.0)), ends)
    else:
        if style == "ring":
            flat = computed(tree, "SQRT", computed(tree, "ADD", computed(tree, "MULTIPLY", x, x),
                computed(tree, "MULTIPLY", z, z)))  # fmt: skip
            off = computed(tree, "SUBTRACT", flat, 0.68)
            radius = 0.3
        else:
            flat = computed(tree, "SQRT", computed(tree, "ADD", computed(tree, "MULTIPLY", x, x),
                computed(tree, "MULTIPLY", z, computed(tree, "MULTIPLY", z, 1.5))))  # fmt: skip
            off, radius = flat, 0.95
        far = computed(tree, "SQRT", computed(tree, "ADD", computed(tree, "MULTIPLY", off, off),
            computed(tree, "MULTIPLY", y, y)))  # fmt: skip
        body = computed(tree, "SUBTRACT", 1.0, computed(tree, "DIVIDE", far, radius))
        body = computed(tree, "MULTIPLY_ADD", computed(tree, "SUBTRACT", grain, 0.5), 3.0, body)
        cloudy = scaled(tree, body, (0.1, 0.9, 0.0, 1.0))
    dense = computed(tree, "MULTIPLY", cloudy, subject["density"] * (0.45 if cup else 1.0))
    color = linear(subject["color_code"])
    inputs = {"Color": color, "Density": dense, "Anisotropy": 0.2}
    if subject["color"] == "black":
        inputs["Density"] = computed(tree, "MULTIPLY", dense, 1.6)
    light = add(tree, "ShaderNodeVolumeScatter", {**inputs}).outputs[0]
    absorb = add(tree, "ShaderNodeVolumeAbsorption", {"Color": color,
        "Density": computed(tree, "MULTIPLY", inputs["Density"], 0.4)}).outputs[0]  # fmt: skip
    inner = add(tree, "ShaderNodeEmission", {"Color": color,  # light that scattered often
        "Strength": computed(tree, "MULTIPLY", dense, 0.1)}).outputs[0]  # fmt: skip
    both = add(tree, "ShaderNodeAddShader", {0: light, 1: absorb}).outputs[0]
    output(tree, volume=add(tree, "ShaderNodeAddShader", {0: both, 1: inner}).outputs[0])
    domain(made, (1.25, 1.0 if style != "plume" else 0.9, 1.25))
    if cup:
        coffee_cup(subject)
    return []


def coffee_cup(subject: dict[str, Any]) -> None:
    look = principled("cup", linear(subject["cup_code"]), Roughness=0.2, Coat_Weight=0.5)
    profile = ((0, -1.05), (0.26, -1.05), (0.3, -1.0), (0.48, -0.5), (0.5, -0.4), (0.47, -0.39),
        (0.45, -0.5), (0.3, -0.9), (0, -0.95))  # fmt: skip
    lathe(profile, look)
    primitive("torus", look, major_radius=0.19, minor_radius=0.045, location=(0.55, 0, -0.66),
        rotation=(math.pi / 2, 0, 0))  # fmt: skip
    primitive("cylinder", principled("coffee", linear("2a1408"), Roughness=0.1), radius=0.445,
        depth=0.02, location=(0, 0, -0.5))  # fmt: skip


def fire(facts: dict[str, Any], base: float, height: float, width: float, calm: float) -> None:
    """Makes a flame: light of its own, and next to nothing in the way of what is behind it."""
    subject = facts["subject"]
    made, tree = material("flame")
    place, x, y, z = axes_of(tree)
    rate = subject["rise"] * (1.0 if calm > 0.5 else 0.5)
    lick = rising(tree, place, rate, facts["fps"], 2.1 / max(width, 0.35) * 0.5, facts["seed"])
    side = computed(tree, "MULTIPLY", computed(tree, "SUBTRACT", lick, 0.5), 1.1 * calm)
    up = computed(tree, "DIVIDE", computed(tree, "SUBTRACT", z, base), height)
    bent = computed(tree, "MULTIPLY_ADD", side, computed(tree, "MAXIMUM", up, 0.0), x)
    far = around_axis(tree, bent, y, z, 1.5 * subject["lean"] * calm, base)
    taper = computed(tree, "POWER", computed(tree, "MAXIMUM",
        computed(tree, "SUBTRACT", 1.0, up), 0.0), 0.8)  # fmt: skip
    root = computed(tree, "SQRT", computed(tree, "MAXIMUM", up, 0.0))
    wide = computed(tree, "MULTIPLY", computed(tree, "MULTIPLY", taper, root), 2.2 * width)
    wide = computed(tree, "ADD", wide, 0.004)
    heat = computed(tree, "SUBTRACT", 1.0, computed(tree, "DIVIDE", far, wide))
    fine = rising(tree, place, 1.6 * rate, facts["fps"], 3.4, facts["seed"] + 17)
    torn = computed(tree, "MULTIPLY", computed(tree, "SUBTRACT", fine, 0.5), 2.4 * calm)
    heat = computed(tree, "MULTIPLY_ADD", torn, computed(tree, "MAXIMUM", up, 0.0), heat)
    ends = computed(tree, "MULTIPLY", scaled(tree, up, (0.0, 0.12, 0.0, 1.0)),
        scaled(tree, up, (0.75, 1.05, 1.0, 0.0)))  # fmt: skip
    heat = computed(tree, "MULTIPLY", heat, ends)
    outer, inner = linear(subject["color_code"][0]), linear(subject["color_code"][1])
    color = ramp(tree, heat, [(0.0, outer), (0.45, outer), (0.8, inner)])
    strength = computed(tree, "MULTIPLY", scaled(tree, heat, (0.0, 0.7, 0.0, 1.0)), 3.2 / width)
    light = add(tree, "ShaderNodeEmission", {"Color": color, "Strength": strength}).outputs[0]
    output(tree, volume=light)
    domain(made, (1.2, 0.7, height / 2 + 0.05), base + height / 2)


FORMS = {  # lowest point, height and half width of a flame, and how far it flickers
    "flame": (-0.95, 1.9, 0.42, 0.8),
    "candle": (0.02, 0.85, 0.15, 0.3),
    "campfire": (-0.8, 1.7, 0.5, 1.0),
    "torch": (-0.1, 1.2, 0.3, 0.9),
}


def flames(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    style, tall = subject["style"], subject["height"]
    outer = linear(subject["color_code"][0])
    base, height, width, calm = FORMS[style]
    fire(facts, base, height * tall, width, calm)
    if style == "candle":
        wax = principled("wax", linear("f2e6cc"), Roughness=0.5, Subsurface_Weight=0.3)
        lathe(((0, -1.1), (0.24, -1.1), (0.24, -0.1), (0.22, -0.04), (0.19, -0.04), (0.1, -0.1),
            (0, -0.11)), wax, smooth=2)  # fmt: skip
        primitive("cylinder", principled("wick", linear("2a2220")), radius=0.015, depth=0.2,
            location=(0, 0, 0))  # fmt: skip
        halo(outer, (0, 0, 0.4), 0.7, 0.06)
    if style == "campfire":
        logs()
    if style == "torch":
        wood = principled("wood", linear("6a4022"), Roughness=0.8)
        primitive("cone", wood, radius1=0.07, radius2=0.13, depth=1.0, location=(0, 0, -0.68))
        cloth = principled("wrap", linear("4a3a2c"), Roughness=0.9)
        primitive("cylinder", cloth, radius=0.16, depth=0.24, location=(0, 0, -0.16))
    if style in ("campfire", "torch"):
        halo(outer, (0, 0, base + 0.4 * height), 1.0, 0.03)
    data = bpy.data.lights.new("fire", "POINT")
    data.energy, data.color = 40, outer[:3]
    placed(data).location = (0, -0.15, base + 0.35 * height)
    for light in [thing for thing in bpy.data.objects if thing.type == "LIGHT"]:
        if light.data.type == "AREA":
            light.data.energy *= 0.35
    return []


def halo(color: Any, place: tuple[float, float, float], radius: float, strength: float) -> Any:
    return primitive("uv_sphere", glowing("halo", color, strength, 4.0), segments=48, ring_count=24,
        radius=radius, location=place)  # fmt: skip


def logs() -> None:
    bark = principled("bark", linear("5a3a22"), Roughness=0.9)
    for number in range(5):
        angle = 2 * math.pi * number / 5 + 0.3
        primitive("cylinder", bark, vertices=20, radius=0.1, depth=1.1,
            location=(0.3 * math.cos(angle), 0.3 * math.sin(angle), -0.85),
            rotation=(0, math.pi / 2 - 0.35, angle))  # fmt: skip


def sparks(facts: dict[str, Any]) -> list[Update]:
    if facts["subject"]["style"] == "fireflies":
        return fireflies(facts)
    subject, rng = facts["subject"], np.random.default_rng(facts["seed"])
    style, count = subject["style"], subject["count"]
    rays = rng.normal(0, 1, (count, 3))
    rays /= np.linalg.norm(rays, axis=1)[:, None]
    born, pace = rng.uniform(0, 1, count), rng.uniform(0.55, 1.0, count)
    trail = np.linspace(0, 1, 5)  # of a streak, from its head backwards in time
    origin = {"burst": (0, 0, 0.1), "fountain": (0, 0, -1.0), "sparkler": (0, 0, 0.3)}[style]

    def flight(t: float) -> tuple[np.ndarray, np.ndarray]:
        clock = t / subject["life"]
        spread = 0.12 * born if style == "burst" else born
        age = (clock + spread + (0.3 if style == "burst" else 0)) % 1
        past = np.maximum(age[:, None] - 0.09 * trail, 0)[..., None]
        speed = pace[:, None, None]
        if style == "fountain":
            way = rays[:, None] * (0.32, 0.32, 0.1) + (0, 0, 1)
            points = way * speed * 4.2 * past - (0, 0, 2.7) * past**2
        else:
            reach = 1.15 if style == "burst" else 0.85
            points = rays[:, None] * speed * reach * (1 - (1 - past) ** 2.5)
            points = points - (0, 0, 0.35) * past**2
        fade = np.clip((1 - age) * 3, 0, 1) * np.clip(age * 20, 0, 1)
        return points + np.array(origin), 0.014 * fade[:, None] * (1 - 0.8 * trail)

    made, tree = material("spark")
    along = add(tree, "ShaderNodeHairInfo").outputs["Intercept"]
    color = linear(subject["color_code"])
    hot = tuple(0.35 * c + 0.65 for c in color[:3]) + (1.0,)
    shade = ramp(tree, along, [(0.0, hot), (0.35, color)])
    strength = scaled(tree, along, (0.0, 1.0, 6.0, 1.2), smooth=False)
    light = add(tree, "ShaderNodeEmission", {"Color": shade, "Strength": strength}).outputs[0]
    clear = add(tree, "ShaderNodeBsdfTransparent").outputs[0]
    output(tree, add(tree, "ShaderNodeAddShader", {0: clear, 1: light}).outputs[0])
    thing = strands(*flight(0), made)

    def update(t: float) -> None:
        points, radius = flight(t)
        set_radius(thing, radius)
        restrand(thing, points)

    halo(color, origin if style != "fountain" else (0, 0, -0.9), 0.4, 0.12)
    if style == "sparkler":
        rod = principled("rod", linear("8a8a90"), Metallic=0.8, Roughness=0.4)
        primitive("cylinder", rod, radius=0.02, depth=1.4, location=(0, 0, -0.42))
    return [update]


def fireflies(facts: dict[str, Any]) -> list[Update]:
    subject, rng = facts["subject"], np.random.default_rng(facts["seed"])
    color = linear(subject["color_code"])
    core = tuple(0.3 * c + 0.7 for c in color[:3]) + (1.0,)
    outside, inside = glowing("halo", color, 1.2, 2.5), glowing("core", core, 8.0, 1.0)
    for _ in range(subject["count"] // 6):
        place, phase = rng.uniform((-1, -0.5, -0.9), (1, 0.5, 0.9)), rng.uniform(0, 6.3, 3)
        size, rate = rng.uniform(0.07, 0.15), rng.uniform(1, 2.2)

        def drift(t: float, place=place, phase=phase, size=size, rate=rate) -> dict[str, Any]:
            off = 0.22 * np.sin(rate * t + phase)
            pulse = size * (0.65 + 0.35 * math.sin(2.5 * rate * t + phase[0]))
            return {"location": tuple(place + off), "scale": (pulse,) * 3}

        for made, share in ((outside, 1.0), (inside, 0.3)):
            thing = primitive("uv_sphere", made, segments=24, ring_count=12, radius=share)
            move(thing, facts, drift)
    return []
