"""Hard-surface objects, with their shadow or without."""

import math
from typing import Any

import bpy
import numpy as np
from nodes import add, linear, material, output, principled
from shapes import extruded, lathe, modified, primitive
from stage import Update, move

PAWN = ((0, -1), (0.52, -1), (0.55, -0.86), (0.42, -0.76), (0.36, -0.66), (0.22, -0.4),
    (0.15, 0.12), (0.34, 0.2), (0.34, 0.26), (0.17, 0.32), (0.31, 0.5), (0.34, 0.68),
    (0.22, 0.92), (0, 0.98))  # fmt: skip
MUG = ((0, -0.7), (0.5, -0.7), (0.56, -0.62), (0.58, 0.7), (0.55, 0.74), (0.51, 0.7),
    (0.49, -0.54), (0.4, -0.6), (0, -0.6))  # fmt: skip


def paint(code: str, finish: str) -> Any:
    metallic = finish == "metallic"
    return principled("paint", linear(code), Metallic=0.95 if metallic else 0.0,
        Roughness={"glossy": 0.12, "matt": 0.7, "metallic": 0.28}[finish],
        Coat_Weight=0.6 if finish == "glossy" else 0.0)  # fmt: skip


def joined(things: list[Any]) -> Any:
    """Joins things into one that moves; the first carries the others."""
    for child in things[1:]:
        child.parent = things[0]
    return things[0]


def outline_of(shape: str) -> np.ndarray:
    """Returns points (N, 2), about 0.95 in radius."""
    if shape == "star":
        angle = np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 0.98, 0.42)
    elif shape == "gear":
        angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        radius = 0.72 + 0.2 * np.clip(2.2 * np.sin(12 * angle), -0.5, 0.5)
    else:  # heart
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        z = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack((x, z + 2.5), 1) * 0.056
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)


def die(look: Any, dots: Any) -> Any:
    cube = modified(
        primitive("cube", look, smooth=False, size=1.2), "BEVEL", width=0.14, segments=4
    )
    step = 0.3
    spots = {1: [(0, 0)], 2: [(-1, -1), (1, 1)], 3: [(-1, -1), (0, 0), (1, 1)],
        4: [(-1, -1), (-1, 1), (1, -1), (1, 1)],
        5: [(-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)],
        6: [(-1, -1), (-1, 0), (-1, 1), (1, -1), (1, 0), (1, 1)]}  # fmt: skip
    sides = {1: (2, 1), 6: (2, -1), 2: (1, -1), 5: (1, 1), 3: (0, 1), 4: (0, -1)}
    pips = []
    for number, (axis, sign) in sides.items():
        for a, b in spots[number]:
            place = [a * step, b * step]
            place.insert(axis, sign * 0.6)
            pip = primitive("uv_sphere", dots, segments=20, ring_count=12, radius=0.11,
                location=place)  # fmt: skip
            pip.scale[axis] = 0.25
            pips.append(pip)
    return joined([cube, *pips])


def donut(look: Any, facts: dict[str, Any]) -> Any:
    dough = primitive("torus", principled("dough", linear("c98a4a"), Roughness=0.6),
        major_radius=0.6, minor_radius=0.32, major_segments=64, minor_segments=28)  # fmt: skip
    icing = primitive("torus", look, major_radius=0.6, minor_radius=0.335, major_segments=64,
        minor_segments=28, location=(0, 0, 0.035))  # fmt: skip
    keep = [v.co.z > 0.02 * math.sin(9 * math.atan2(v.co.y, v.co.x)) for v in icing.data.vertices]
    for vertex, kept in zip(icing.data.vertices, keep, strict=True):
        if not kept:
            flat = vertex.co.to_2d()
            middle = 0.6 * flat.normalized()
            flat = middle + (flat - middle) * 0.9
            vertex.co = (flat.x, flat.y, vertex.co.z * 0.9)
    rng, parts = np.random.default_rng(facts["seed"]), [dough, icing]
    for code in ("ff3a5a", "3a8aff", "ffd23a", "ffffff", "4ac86a"):
        sprinkle = principled("sprinkle", linear(code), Roughness=0.3)
        for _ in range(9):
            a, b = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 2.5)
            r, z = 0.6 + 0.34 * math.cos(b), 0.035 + 0.34 * math.sin(b)
            parts.append(primitive("cylinder", sprinkle, vertices=8, radius=0.025, depth=0.13,
                location=(r * math.cos(a), r * math.sin(a), z),
                rotation=(math.pi / 2, rng.uniform(-0.4, 0.4), rng.uniform(0, 6.3))))  # fmt: skip
    return joined(parts)


def striped_ball(facts: dict[str, Any]) -> Any:
    subject = facts["subject"]
    made, tree = material("stripes")
    place = add(tree, "ShaderNodeTexCoord").outputs["Object"]
    axes = add(tree, "ShaderNodeSeparateXYZ", {0: place}).outputs
    angle = add(tree, "ShaderNodeMath", {0: axes[1], 1: axes[0]}, operation="ARCTAN2").outputs[0]
    wave = add(tree, "ShaderNodeMath", {0: angle, 1: 3 / math.pi}, operation="MULTIPLY").outputs[0]
    part = add(tree, "ShaderNodeMath", {0: wave, 1: 2.0}, operation="FLOORED_MODULO").outputs[0]
    even = add(tree, "ShaderNodeMath", {0: part, 1: 1.0}, operation="GREATER_THAN").outputs[0]
    second = subject["second_code"] if subject["second"] != subject["color"] else "ece9e2"
    if second == subject["color_code"]:
        second = "2360d0"
    inputs = {0: even, 6: linear(subject["color_code"]), 7: linear(second)}
    color = add(tree, "ShaderNodeMix", inputs, data_type="RGBA").outputs[2]
    rough = {"glossy": 0.12, "matt": 0.7, "metallic": 0.28}[subject["finish"]]
    shader = add(tree, "ShaderNodeBsdfPrincipled", {"Base Color": color, "Roughness": rough,
        "Metallic": 0.9 if subject["finish"] == "metallic" else 0.0})  # fmt: skip
    output(tree, shader.outputs[0])
    return primitive("uv_sphere", made, segments=64, ring_count=32, radius=0.85)


def mug(look: Any) -> Any:
    handle = primitive("torus", look, major_radius=0.34, minor_radius=0.085, major_segments=40,
        minor_segments=16, location=(0.6, 0, 0), rotation=(math.pi / 2, 0, 0))  # fmt: skip
    return joined([lathe(MUG, look), handle])


def build(facts: dict[str, Any]) -> Any:
    subject = facts["subject"]
    shape, look = subject["shape"], paint(subject["color_code"], subject["finish"])
    if shape in ("star", "gear", "heart"):
        thing = extruded(outline_of(shape), 0.4, look)
        if shape == "gear":
            hole = primitive("cylinder", look, radius=0.25, depth=2, rotation=(math.pi / 2, 0, 0))
            hole.hide_render = True
            modifier = thing.modifiers.new("hole", "BOOLEAN")
            modifier.operation, modifier.object = "DIFFERENCE", hole
            thing.modifiers.move(1, 0)
        return thing
    if shape == "pawn":
        return lathe(PAWN, look)
    if shape == "die":
        light = subject["color"] in ("white", "yellow", "pink")
        return die(look, paint("16161a" if light else "f4f2ec", "matt"))
    if shape == "donut":
        return donut(look, facts)
    if shape == "mug":
        return mug(look)
    if shape == "ball":
        return striped_ball(facts)
    if shape == "monkey":
        return modified(primitive("monkey", look, size=1.5), "SUBSURF", levels=2, render_levels=2)
    return primitive("torus", look, major_radius=0.66, minor_radius=0.26, major_segments=72,
        minor_segments=32)  # fmt: skip


LYING = {"torus": 55, "donut": 38}  # degrees towards the camera


def objects(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    thing = build(facts)
    lean = math.radians(subject["tilt"] + LYING.get(subject["shape"], 0))
    flat = subject["shape"] in ("star", "gear", "heart")

    def place(t: float) -> dict[str, Any]:
        turned = math.radians(subject["spin"] * t) * (0.6 if flat else 1)
        jump = abs(math.sin(subject["rate"] * t)) if subject["motion"] == "bouncing" else 0.0
        roll = 0.0 if jump == 0.0 else 0.3 * turned
        if subject["shadow"]:
            return {"rotation_euler": (0 if not LYING.get(subject["shape"]) else 0.1, roll, turned),
                "location": (0, 0, 0.45 * jump)}  # fmt: skip
        return {"rotation_euler": (lean, roll, turned), "location": (0, 0, 0.6 * jump - 0.2)}

    move(thing, facts, place)
    if subject["shadow"]:
        bpy.context.view_layer.update()
        parts = [thing, *thing.children]
        lowest = min((part.matrix_world @ vertex.co).z for part in parts
            for vertex in part.data.vertices if not part.hide_render)  # fmt: skip
        ground = primitive("plane", smooth=False, size=30, location=(0, 0, min(lowest, -0.3)))
        ground.is_shadow_catcher = True
    return []
