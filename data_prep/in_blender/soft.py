"""Hair and fur, cloth, leaves, feathers and paper."""

import math
from typing import Any

import numpy as np
from nodes import add, linear, material, mixed, output, principled
from nodes import math as computed
from shapes import (
    grid,
    grid_faces,
    mesh,
    modified,
    primitive,
    reshape,
    restrand,
    strands,
    with_uv,
)
from stage import Update, move

KNOTS = 8  # points of a strand


def hair_material(code: str) -> Any:
    return principled("hair", linear(code), Roughness=0.45, Sheen_Weight=0.3,
        Specular_IOR_Level=0.4)  # fmt: skip


def sphere_points(count: int, rng: np.random.Generator) -> np.ndarray:
    points = rng.normal(0, 1, (count, 3))
    return points / np.linalg.norm(points, axis=1)[:, None]


def hair(facts: dict[str, Any]) -> list[Update]:
    style = facts["subject"]["style"]
    return lock(facts) if style == "lock" else fur(facts, eyes=style == "creature")


def fur(facts: dict[str, Any], eyes: bool) -> list[Update]:
    subject, rng = facts["subject"], np.random.default_rng(facts["seed"])
    core = 0.55
    look = hair_material(subject["color_code"])
    primitive("uv_sphere", look, segments=32, ring_count=16, radius=core)
    out = sphere_points(5200, rng)
    if eyes:
        out = out[(np.abs(np.abs(out[:, 0]) - 0.38) > 0.26) | (out[:, 1] > -0.4)
            | (np.abs(out[:, 2] - 0.25) > 0.28)]  # fmt: skip
        face(core)
    length = subject["length"] * rng.uniform(0.55, 1.1, len(out))
    s = np.linspace(0, 1, KNOTS)
    phase, side = rng.uniform(0, 6.3, (2, len(out)))
    sideways = np.cross(out, sphere_points(len(out), rng))
    curl = 0.18 * subject["curl"] * sideways[:, None] * np.sin(9 * s + phase[:, None])[..., None]

    def shape(t: float) -> np.ndarray:
        gust = subject["strength"] * (0.7 + 0.5 * np.sin(subject["rate"] * t + 1.5 * out[:, 2]
            + 0.4 * np.sin(side)))  # fmt: skip
        bend = np.zeros((len(out), KNOTS, 3))
        bend[..., 0] = subject["wind"] * gust[:, None] * s**2
        bend[..., 2] = -0.35 * s**2
        straight = out[:, None] * s[:, None]
        return out[:, None] * core * 0.97 + length[:, None, None] * (
            straight + bend + curl * s[:, None]
        )

    thing = strands(shape(0), 0.011 * (1 - 0.85 * s), look)
    return [lambda t: restrand(thing, shape(t))]


def face(core: float) -> None:
    white, black = (
        principled("eye", (0.9, 0.9, 0.88, 1), Roughness=0.1),
        principled("pupil", (0.01, 0.01, 0.012, 1), Roughness=0.05),
    )
    for side in (-1, 1):
        primitive("uv_sphere", white, radius=0.2, location=(0.22 * side, -core + 0.03, 0.14))
        primitive("uv_sphere", black, radius=0.12, location=(0.21 * side, -core - 0.1, 0.13))


def lock(facts: dict[str, Any]) -> list[Update]:
    subject, rng = facts["subject"], np.random.default_rng(facts["seed"])
    look, count, knots = hair_material(subject["color_code"]), 2600, 20
    s = np.linspace(0, 1, knots)
    root = np.column_stack((rng.normal(0, 0.1, count), rng.normal(0, 0.06, count)))
    spread, phase = rng.normal(0, 1, (count, 2)), rng.uniform(0, 6.3, count)
    clump = rng.integers(0, 9, count)
    length = rng.uniform(1.5, 2.1, count)

    def shape(t: float) -> np.ndarray:
        points = np.empty((count, knots, 3))
        wave = subject["rate"] * t - 3.2 * s
        swing = subject["strength"] * (0.75 * s**1.4 + 0.45 * s * np.sin(wave))
        tuft = 1.0 * clump[:, None] + 7 * s
        curl = 0.14 * subject["curl"] * np.minimum(s * 2, 1)
        points[..., 0] = (
            root[:, :1] * (1 + 1.5 * np.sin(2.6 * s)) * (1 - 0.35 * s) + subject["wind"] * swing
        )
        points[..., 0] += 0.05 * spread[:, :1] * s**2 + curl * np.sin(tuft)
        points[..., 1] = root[:, 1:] * (1 + s) + 0.05 * spread[:, 1:] * s + curl * np.cos(tuft)
        points[..., 0] += 0.02 * s * np.sin(wave * 1.7 + phase[:, None])
        points[..., 2] = 1.0 - length[:, None] * s
        return points

    thing = strands(shape(0), 0.008 * (1 - 0.8 * s**2), look)
    band = principled("band", linear("c02848"), Roughness=0.5)
    primitive("torus", band, major_radius=0.2, minor_radius=0.07, location=(0, 0, 0.93))
    return [lambda t: restrand(thing, shape(t))]


def cloth_material(subject: dict[str, Any]) -> Any:
    made, tree = material("cloth")
    color: Any = linear(subject["color_code"])
    if subject["pattern"] == "striped":
        place = add(tree, "ShaderNodeTexCoord").outputs["UV"]
        across = add(tree, "ShaderNodeSeparateXYZ", {0: place}).outputs[
            1 if subject["style"] == "flag" else 0
        ]
        wave = computed(tree, "FRACT", computed(tree, "MULTIPLY", across, 4.0))
        even = computed(tree, "GREATER_THAN", wave, 0.5)
        inputs = {0: even, 6: color, 7: linear(subject["second_code"])}
        color = add(tree, "ShaderNodeMix", inputs, data_type="RGBA").outputs[2]
    shader = add(tree, "ShaderNodeBsdfPrincipled", {"Base Color": color, "Roughness": 0.7,
        "Sheen Weight": 0.4}).outputs[0]  # fmt: skip
    through = add(tree, "ShaderNodeBsdfTranslucent", {"Color": color}).outputs[0]
    shader = mixed(tree, 0.35, shader, through)
    if subject["style"] == "veil":  # threads cover more where it is seen from the side
        facing = add(tree, "ShaderNodeLayerWeight", {"Blend": 0.35}).outputs["Facing"]
        span = {"Value": facing, "To Min": subject["opacity"], "To Max": 0.95}
        cover = add(tree, "ShaderNodeMapRange", span).outputs[0]
        clear = add(tree, "ShaderNodeBsdfTransparent").outputs[0]
        shader = mixed(tree, cover, clear, shader)
    output(tree, shader)
    return made


def cloth(facts: dict[str, Any]) -> list[Update]:
    subject = facts["subject"]
    style, rows, columns = subject["style"], 70, 70
    u, v = grid(rows, columns)
    thing = mesh(np.zeros((rows * columns, 3)), grid_faces(rows, columns), cloth_material(subject))
    with_uv(thing, u, v)
    wave = {"flag": flag, "veil": veil, "scarf": scarf}[style]
    reshape(thing, wave(subject, u, v, 0.0))
    if style == "flag":
        pole = principled("pole", linear("b8bcc4"), Metallic=0.9, Roughness=0.3)
        side = -subject["wind"]
        primitive("cylinder", pole, radius=0.035, depth=2.4, location=(0.86 * side, 0, -0.12))
        primitive("uv_sphere", pole, radius=0.07, location=(0.86 * side, 0, 1.1))
    return [lambda t: reshape(thing, wave(subject, u, v, t))]


def flag(subject: dict[str, Any], u: np.ndarray, v: np.ndarray, t: float) -> np.ndarray:
    phase = 2 * subject["rate"] * t - 2.2 * subject["folds"] * u
    y = 0.26 * np.sqrt(u) * np.sin(phase + 0.9 * v)
    x = subject["wind"] * (1.62 * u - 0.84) + 0.04 * u * np.cos(phase)
    z = 0.98 - 1.1 * v + 0.06 * u * np.sin(phase * 0.8 + 1) - 0.12 * u**2
    return np.stack((x, y, z), 1)


def veil(subject: dict[str, Any], u: np.ndarray, v: np.ndarray, t: float) -> np.ndarray:
    """Makes cloth that hangs in folds and is blown out from below."""
    phase, k = subject["rate"] * t, 2 * math.pi * subject["folds"]
    gather = 0.55 + 0.45 * v
    fold = (0.05 + 0.17 * v) * np.sin(k * u + 0.8 * np.sin(phase * 0.6 + 2 * v))
    blow = 0.35 * v**1.6 * (1 + 0.5 * np.sin(phase - 2.5 * v))
    x = (u - 0.5) * 1.7 * gather + subject["wind"] * blow
    y = fold + 0.15 * v * np.sin(phase + 3 * u)
    z = 0.98 - 1.9 * v + 0.1 * v**2
    return np.stack((x, y, z + 0.06 * v * np.sin(phase + 4 * u)), 1)


def scarf(subject: dict[str, Any], u: np.ndarray, v: np.ndarray, t: float) -> np.ndarray:
    phase = 1.5 * subject["rate"] * t - 1.6 * subject["folds"] * u
    x = subject["wind"] * (2.1 * u - 1.05)
    z = 0.32 * np.sin(phase) * (0.3 + 0.7 * u) + 0.62 * (0.5 - v) + 0.12 * np.sin(2 * phase + 2 * v)
    y = 0.3 * np.cos(phase + 1.3 * v) + 0.2 * (0.5 - v)
    return np.stack((x, y, z), 1)


def leaves(facts: dict[str, Any]) -> list[Update]:
    subject, rng = facts["subject"], np.random.default_rng(facts["seed"])
    make = {"leaf": leaf, "feather": feather, "paper": paper}[subject["thing"]]
    for number in range(subject["count"]):
        thing = make(subject, rng)
        size = rng.uniform(0.34, 0.52)
        x, y = rng.uniform(-0.95, 0.95), rng.uniform(-0.5, 0.5)
        start = 2.8 * (number + rng.uniform(0, 0.6)) / subject["count"]
        speed = subject["speed"] * rng.uniform(0.75, 1.25)
        turn, angles = rng.uniform(-1, 1, 3), rng.uniform(0, 6.3, 3)
        angles[0] = rng.uniform(0.6, 2.2)  # broadside to the camera, more or less
        rate, swing = math.radians(subject["tumble"]), rng.uniform(0.1, 0.25)

        def fall(t: float, x=x, y=y, start=start, speed=speed, turn=turn, angles=angles,
            swing=swing, size=size, rate=rate) -> dict[str, Any]:  # fmt: skip
            low = (start + speed * t) % 2.8
            side = subject["way"] * 0.25 * speed * t + swing * math.sin(3 * t + angles[1])
            return {
                "location": ((x + side + 1.3) % 2.6 - 1.3, y, 1.4 - low),
                "rotation_euler": tuple(angles + rate * t * turn),
                "scale": (size,) * 3,
            }

        move(thing, facts, fall)
    return []


def leaf(subject: dict[str, Any], rng: np.random.Generator) -> Any:
    u, v = grid(15, 25)
    along, side = 2 * u - 1, 2 * v - 1
    half = 0.42 * np.sin(np.pi * u) ** 0.8 * (1.1 - 0.45 * u) * (1 + 0.05 * np.sin(40 * u))
    points = np.stack((along, side * half, 0.3 * along**2 + 0.35 * np.abs(side) * half), 1)
    made, tree = material("leaf")
    place = add(tree, "ShaderNodeTexCoord").outputs["UV"]
    x, y, _ = add(tree, "ShaderNodeSeparateXYZ", {0: place}).outputs
    middle = computed(tree, "ABSOLUTE", computed(tree, "SUBTRACT", y, 0.5))
    slant = computed(tree, "SUBTRACT", computed(tree, "MULTIPLY", x, 9.0),
        computed(tree, "MULTIPLY", middle, 8.0))  # fmt: skip
    vein = computed(tree, "LESS_THAN", computed(tree, "FRACT", slant), 0.14)
    rib = computed(tree, "MAXIMUM", computed(tree, "LESS_THAN", middle, 0.035), vein)
    base = np.array(linear(subject["color_code"]))
    base[:3] *= rng.uniform(0.7, 1.15)
    inputs = {0: rib, 6: tuple(base), 7: tuple(np.append(np.clip(base[:3] * 2 + 0.04, 0, 1), 1))}
    color = add(tree, "ShaderNodeMix", inputs, data_type="RGBA").outputs[2]
    shader = add(tree, "ShaderNodeBsdfPrincipled", {"Base Color": color, "Roughness": 0.45})
    through = add(tree, "ShaderNodeBsdfTranslucent", {"Color": color})
    output(tree, mixed(tree, 0.35, shader.outputs[0], through.outputs[0]))
    thing = with_uv(mesh(points, grid_faces(15, 25), made), u, v)
    stem = primitive("cylinder", made, radius=0.025, depth=0.5, location=(1.15, 0, 0.4),
        rotation=(0, 1.0, 0))  # fmt: skip
    stem.parent = thing
    return thing


def feather(subject: dict[str, Any], rng: np.random.Generator) -> Any:
    """Makes a quill with barbs on both sides, downy near its root."""
    look = hair_material(subject["color_code"])
    count, s = 420, np.linspace(0, 1, 6)
    place = rng.uniform(0, 1, count)
    side = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
    reach = 0.42 * np.clip(np.sin(np.pi * place**0.75), 0.15, 1) * rng.uniform(0.85, 1, count)
    downy = np.clip(1 - 5 * place, 0, 1)
    points = np.empty((count, 6, 3))
    points[..., 0] = (2 * place - 0.85)[:, None] + reach[:, None] * (
        0.75 * s - 0.2 * downy[:, None]
    )
    points[..., 1] = (side * reach)[:, None] * s * (1 - 0.25 * s)
    points[..., 2] = 0.25 * points[..., 0] ** 2 + 0.05 * s + 0.2 * (downy * rng.normal(0, 1, count)
        )[:, None] * s**2  # fmt: skip
    thing = strands(points, 0.02 * (1 - 0.6 * s), look)
    quill = np.linspace(-1.3, 1.1, 14)
    line = np.stack((quill, 0 * quill, 0.25 * quill**2), 1)
    shaft = strands(line[None], np.linspace(0.035, 0.01, 14),
        principled("shaft", linear("efe6d2"), Roughness=0.4))  # fmt: skip
    shaft.parent = thing
    return thing


def paper(subject: dict[str, Any], rng: np.random.Generator) -> Any:
    u, v = grid(9, 13)
    curl = rng.uniform(0.15, 0.45) * rng.choice((-1, 1))
    x, y = 2 * u - 1, 1.42 * v - 0.71
    points = np.stack((x, y, curl * (x + 0.3 * y) ** 2), 1)
    made, tree = material("paper")
    color = linear(subject["color_code"])
    place = add(tree, "ShaderNodeTexCoord").outputs["UV"]
    across = add(tree, "ShaderNodeSeparateXYZ", {0: place}).outputs[0]
    line = computed(tree, "LESS_THAN", computed(tree, "FRACT",
        computed(tree, "MULTIPLY", across, 9.0)), 0.16)  # fmt: skip
    dark = tuple(0.35 * c for c in color[:3]) + (1.0,)
    ruled = add(tree, "ShaderNodeMix", {0: line, 6: color, 7: dark}, data_type="RGBA").outputs[2]
    shader = add(tree, "ShaderNodeBsdfPrincipled", {"Base Color": ruled, "Roughness": 0.8})
    through = add(tree, "ShaderNodeBsdfTranslucent", {"Color": ruled})
    output(tree, mixed(tree, 0.25, shader.outputs[0], through.outputs[0]))
    return modified(
        with_uv(mesh(points, grid_faces(9, 13), made), u, v), "SUBSURF", render_levels=1
    )
