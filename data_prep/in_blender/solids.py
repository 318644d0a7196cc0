"""Glass, liquids, bubbles and wires."""

import math
from typing import Any

import numpy as np
from nodes import add, linear, material, mixed, output, principled, ramp
from nodes import math as computed
from shapes import lathe, modified, placed, primitive, reshape, spline, tubes
from stage import Update, move

import bpy  # isort: skip

WALL = 0.06
PROFILES = {  # (radius, height) of the outside, then of the inside back to the axis
    "vase": ((0, -1), (0.42, -1), (0.46, -0.96), (0.62, -0.35), (0.5, 0.25), (0.26, 0.62),
        (0.36, 0.95), (0.46, 1), (0.41, 0.98), (0.31, 0.92), (0.2, 0.62), (0.43, 0.22),
        (0.54, -0.35), (0.38, -0.86), (0, -0.88)),
    "goblet": ((0, -1), (0.5, -1), (0.5, -0.97), (0.12, -0.88), (0.07, -0.7), (0.07, -0.2),
        (0.16, -0.1), (0.48, 0.2), (0.56, 0.55), (0.46, 1), (0.43, 1), (0.52, 0.55),
        (0.44, 0.23), (0.12, 0), (0, -0.02)),
    "bottle": ((0, -1), (0.4, -1), (0.46, -0.94), (0.46, 0), (0.4, 0.25), (0.17, 0.5),
        (0.15, 0.92), (0.19, 0.93), (0.19, 1.0), (0.13, 1.0), (0.11, 0.5), (0.34, 0.22),
        (0.4, 0), (0.4, -0.88), (0, -0.92)),
    "tumbler": ((0, -0.8), (0.45, -0.8), (0.5, -0.77), (0.66, 0.9), (0.63, 0.92), (0.6, 0.9),
        (0.46, -0.66), (0.4, -0.68), (0, -0.68)),
}  # fmt: skip


def glass_of(name: str, code: str, depth: float, roughness: float = 0.0) -> Any:
    """Glass with a body of its own colour: what light takes on its way through is a colour that
    one alpha cannot hold."""
    made, tree = material(name)
    color = linear(code)
    clear = add(tree, "ShaderNodeBsdfPrincipled", {"Base Color": color, "Transmission Weight": 1.0,
        "Roughness": roughness, "IOR": 1.45}).outputs[0]  # fmt: skip
    # light reaches what is behind glass: paths that would find it by chance are too dear
    rays = add(tree, "ShaderNodeLightPath").outputs
    straight = add(tree, "ShaderNodeBsdfTransparent", {"Color": color}).outputs[0]
    dim = computed(tree, "MAXIMUM", rays["Is Shadow Ray"], rays["Is Diffuse Ray"])
    clear = mixed(tree, dim, clear, straight)
    inner = add(tree, "ShaderNodeBsdfTranslucent", {"Color": color}).outputs[0]
    outer = add(tree, "ShaderNodeBsdfDiffuse", {"Color": color}).outputs[0]
    output(tree, mixed(tree, depth, clear, mixed(tree, 0.5, inner, outer)))
    return made


def turn(thing: Any, facts: dict[str, Any]) -> None:
    subject = facts["subject"]
    tilt = math.radians(subject.get("tilt", 0))
    move(thing, facts, lambda t: {
        "rotation_euler": (tilt, 0.6 * tilt, math.radians(subject["spin"] * t))})  # fmt: skip


def glass(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    depth = 0.02 if subject["tint"] == "clear" else subject["depth"]
    look = glass_of("glass", subject["tint_code"], depth, 0.18 if subject["frosted"] else 0.0)
    shape = subject["shape"]
    if shape in PROFILES:
        thing = lathe(PROFILES[shape], look)
    elif shape == "sphere":
        thing = primitive("uv_sphere", look, segments=64, ring_count=32, radius=0.85)
    elif shape == "ring":
        thing = primitive("torus", look, major_radius=0.66, minor_radius=0.27, major_segments=72,
            minor_segments=32, rotation=(1.1, 0, 0))  # fmt: skip
        bpy.ops.object.transform_apply(location=False, rotation=True, scale=False)
    elif shape == "cube":
        thing = primitive("cube", look, smooth=False, size=1.15)
        modified(thing, "BEVEL", width=0.08, segments=4)
    else:  # a gem: crown and pavilion of eight sides
        thing = primitive("cone", look, smooth=False, vertices=8, radius1=0.85, radius2=0.0,
            depth=1.0, rotation=(math.pi, 0, 0), location=(0, 0, -0.3))  # fmt: skip
        crown = primitive("cone", look, smooth=False, vertices=8, radius1=0.85, radius2=0.5,
            depth=0.36, location=(0, 0, 0.38))  # fmt: skip
        thing.select_set(True)
        crown.select_set(True)
        bpy.ops.object.join()
        thing = bpy.context.active_object
        bpy.context.scene.cursor.location = (0, 0, 0)
        bpy.ops.object.origin_set(type="ORIGIN_CURSOR")
    turn(thing, facts)
    return []


def liquid(facts: dict[str, Any]) -> list[Update]:
    return {"tumbler": tumbler, "blob": blob, "drops": drops}[facts["subject"]["style"]](facts)


def tumbler(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    lathe(PROFILES["tumbler"], glass_of("glass", "f2f8fa", 0.02))
    level, rows = subject["level"], 20
    heights = np.linspace(-0.64, level, rows)
    wall = 0.445 + (heights + 0.66) / 1.56 * 0.14
    profile = [(0.0, -0.64), *zip(wall.tolist(), heights.tolist(), strict=True)]
    top = [(wall[-1] * share, level) for share in np.linspace(0.95, 0, 10)]
    drink = glass_of("drink", subject["tint_code"], 0.75)
    thing = lathe([*profile, *top], drink, smooth=1)
    rest = np.array([vertex.co for vertex in thing.data.vertices])
    share = np.clip((rest[:, 2] + 0.64) / (level + 0.64), 0, 1)

    def slosh(t: float) -> None:
        points = rest.copy()
        phase = subject["rate"] * t
        slope = math.sin(phase) * subject["swing"] * 1.6
        wave = slope * rest[:, 0] + 0.25 * subject["swing"] * np.cos(phase + 7 * rest[:, 0])
        points[:, 2] += share**2 * wave
        reshape(thing, points)

    return [slosh]


def blob(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    look = glass_of("liquid", subject["tint_code"], 0.35, 0.02)
    data = bpy.data.metaballs.new("blob")
    data.resolution = data.render_resolution = 0.07
    placed(data, material=look)
    rng = np.random.default_rng(facts["seed"])
    places, phases = rng.normal(0, 0.34, (9, 3)), rng.uniform(0, 6.3, (9, 3))
    places[0] = 0
    parts = [data.elements.new() for _ in places]
    for part, radius in zip(parts, [0.9, *rng.uniform(0.35, 0.65, 8)], strict=True):
        part.radius = radius

    def wobble(t: float) -> None:
        rate, swing = subject["rate"], 1.4 * subject["swing"]
        for part, place, phase in zip(parts, places, phases, strict=True):
            part.co = place * 1.25 + swing * np.sin(0.7 * rate * t + phase)

    return [wobble]


def drops(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    look = glass_of("liquid", subject["tint_code"], 0.4, 0.0)
    rng = np.random.default_rng(facts["seed"])
    profile = [(0.0, 1.9), (0.1, 1.45), (0.35, 0.85), (0.8, 0.2), (0.95, -0.35), (0.6, -0.9),
        (0.0, -1.05)]  # fmt: skip
    for number in range(subject["count"]):
        thing, size = lathe(profile, look), rng.uniform(0.1, 0.22)
        x, y = rng.uniform(-0.95, 0.95), rng.uniform(-0.6, 0.6)
        start, speed = rng.uniform(0, 3) + number * 0.2, rng.uniform(1.0, 1.7)

        def fall(t: float, x=x, y=y, start=start, speed=speed, size=size) -> dict[str, Any]:
            low = (start + speed * t) % 3.2
            return {"location": (x, y, 1.6 - low), "scale": (size, size, size * 1.1)}

        move(thing, facts, fall)
    return []


def bubbles(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    look = film_of(subject["film"])
    rng = np.random.default_rng(facts["seed"])
    single = subject["count"] == 1
    for _ in range(subject["count"]):
        thing = primitive("uv_sphere", look, segments=48, ring_count=24, radius=1.0)
        size = 0.85 if single else rng.uniform(0.13, 0.38)
        x, y, start = (0, 0, 1.3) if single else rng.uniform((-0.9, -0.5, 0), (0.9, 0.5, 2.6))
        phase, rise = rng.uniform(0, 6.3), 0 if single else subject["rise"] * rng.uniform(0.7, 1.4)

        def float_up(t: float, x=x, y=y, s=start, p=phase, r=rise, size=size) -> dict[str, Any]:
            wave = subject["wobble"] * math.sin(subject["rate"] * t + p)
            up = (s + r * t) % 2.9 - 1.3
            return {"location": (x + 0.06 * math.sin(2 * t + p), y, up),
                "scale": (size * (1 + wave), size * (1 - 0.6 * wave), size * (1 - wave)),
                "rotation_euler": (0, 0.3 * math.sin(t + p), p + t)}  # fmt: skip

        move(thing, facts, float_up)
    return []


def film_of(phase: float) -> Any:
    """Makes a thin film: interference colours by thickness and angle, most at the outline."""
    made, tree = material("film")
    facing = add(tree, "ShaderNodeLayerWeight", {"Blend": 0.5}).outputs["Facing"]
    place = add(tree, "ShaderNodeTexCoord").outputs["Object"]
    swirl = add(tree, "ShaderNodeTexNoise", {"Vector": place, "Scale": 1.6, "Distortion": 1.8})
    thick = computed(tree, "ADD", computed(tree, "MULTIPLY", swirl.outputs[0], 1.6), phase)
    thick = computed(tree, "ADD", thick, computed(tree, "MULTIPLY", facing, 1.2))
    hue = computed(tree, "FRACT", thick)
    codes = ("ff5ab0", "ffd24a", "5aff9a", "3ad0ff", "8a5aff", "ff5ab0")
    colors = ramp(tree, hue, [(i / 5, linear(code)) for i, code in enumerate(codes)])
    glossy = add(tree, "ShaderNodeBsdfGlossy", {"Color": colors, "Roughness": 0.02}).outputs[0]
    glow = add(tree, "ShaderNodeBsdfTranslucent", {"Color": colors}).outputs[0]
    clear = add(tree, "ShaderNodeBsdfTransparent").outputs[0]
    share = add(tree, "ShaderNodeMapRange", {"Value": computed(tree, "POWER", facing, 2.2),
        "To Min": 0.06, "To Max": 0.85}).outputs[0]  # fmt: skip
    output(tree, mixed(tree, share, clear, mixed(tree, 0.35, glossy, glow)))
    return made


def wires(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    dark = subject["metal"] == "black iron"
    metal = principled("metal", linear(subject["metal_code"]), Metallic=0.2 if dark else 1.0,
        Roughness=0.35)  # fmt: skip
    if subject["style"] == "cage":
        thing = primitive("ico_sphere", metal, smooth=False, subdivisions=2, radius=0.95)
        modified(thing, "WIREFRAME", thickness=2.2 * subject["thick"])
        turn(thing, facts)
        return []
    if subject["style"] == "tangle":
        rng = np.random.default_rng(facts["seed"])
        knots = rng.normal(0, 1, (46, 3))
        knots *= 0.92 * rng.uniform(0.75, 1, (46, 1)) / np.linalg.norm(knots, axis=1)[:, None]
        turn(tubes([spline(knots, 12)], subject["thick"], metal), facts)
        return []
    return {"net": net, "coil": coil}[subject["style"]](facts, metal)


def net(facts: dict[str, Any], metal: Any) -> list[Update]:
    subject, n = facts["subject"], facts["subject"]["rings"]
    v, u = np.mgrid[-1 : 1 : (n + 1) * 1j, -1:1:49j]
    flat = np.concatenate((np.stack((u, v), -1), np.stack((v, u), -1))).astype(float)
    lines = [tubes([np.insert(line, 1, 0, axis=1)], subject["thick"], metal) for line in flat]

    def wave(t: float) -> None:
        for line, (x, z) in zip(lines, np.moveaxis(flat, 2, 1), strict=True):
            phase = subject["rate"] * t
            y = 0.22 * np.sin(2.4 * x + phase) + 0.12 * np.cos(3.1 * z - 0.8 * phase)
            co = np.stack((0.9 * x + 0.05 * np.sin(2 * z + phase), y, 0.9 * z, np.ones_like(x)), 1)
            line.data.splines[0].points.foreach_set("co", co.astype(np.float32).ravel())
            line.data.update_tag()

    return [wave]


def coil(facts: dict[str, Any], metal: Any) -> list[Update]:
    subject = facts["subject"]
    s = np.linspace(0, 1, 40 * subject["rings"])
    angle = 2 * math.pi * subject["rings"] * s
    path = np.stack((0.45 * np.cos(angle), 0.45 * np.sin(angle), 2 * s - 1), 1)
    thing = tubes([path], 2 * subject["thick"], metal)
    tilt = math.radians(25)

    def stretch(t: float) -> None:
        length = 0.72 + 0.22 * math.sin(subject["rate"] * t)
        co = np.column_stack((path * (1, 1, length), np.ones(len(path))))
        thing.data.splines[0].points.foreach_set("co", co.astype(np.float32).ravel())
        thing.data.update_tag()

    move(thing, facts, lambda t: {"rotation_euler": (0, tilt, math.radians(subject["spin"] * t))})
    return [stretch]
