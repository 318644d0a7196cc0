"""Draws procedural RGBA clips with exact straight colour and exact alpha, without any background.

Space: x right, y down, origin at the centre of the frame, the short side is 1. Time: seconds at 16
frames/s. Fields broadcast as (C, T, H, W); colour stays in [0, 1] until the end of `render`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from acetate.data.drawing import (
    CORNERS,
    WHITE,
    Canvas,
    Dice,
    Layer,
    box,
    canvas_of,
    color,
    figure,
    inside,
    lit,
    look_up,
    mix,
    rotate,
    smoothstep,
    splat,
    stack,
    textured,
)

KINDS = ("hair", "glass", "smoke", "flame", "particles", "shadow", "shape")
HAIR = {
    "black": "2a2430", "chestnut": "7a4327", "blond": "dcb469", "red": "b5482a", "silver": "b9bec8",
    "white": "efece6", "teal": "1d9aa0", "pink": "ee7fae", "violet": "7d5bd0",
}  # fmt: skip
SMOKE = {"white": "f4f4f2", "grey": "a9acb3", "dark": "57545e", "blue": "9fc3ee", "pink": "f3b3cc"}
FLAMES = {  # from cold to hot
    "orange": ("8c1506", "f4641a", "ffc53d", "fff6d0"),
    "red": ("5c0612", "d3202c", "ff7a45", "ffe2b0"),
    "blue": ("12248c", "2b6df2", "6fd3ff", "effcff"),
    "green": ("06502f", "1fae5c", "a5ee70", "f6ffdc"),
    "violet": ("3a0a7a", "8a3cf0", "e58cff", "fff0ff"),
}
SPARKS = {
    "fountain": "fountain of sparks", "burst": "firework bursting",
    "swirl": "swirl of glowing motes",
    "drift": "fireflies drifting upwards",
}  # fmt: skip


@dataclass(frozen=True)
class SyntheticClip:
    """A drawn clip: rgb (3, T, H, W) straight in [-1, 1]; alpha (1, T, H, W) in [0, 1]; both
    float32."""

    rgb: Tensor
    alpha: Tensor
    prompt: str
    kind: str


def render(kind: str, seed: int, frames: int, height: int, width: int) -> SyntheticClip:
    """Draws a clip from (kind, seed) alone; another size or length shows the same subject, frame k
    at k/16 s."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a synthetic kind; known kinds: {', '.join(KINDS)}")
    x, y, t, px = canvas_of(frames, height, width)
    dice = Dice(kind, seed)
    scale, (a, b) = dice.real(0.8, 1.15), dice.reals(2, 0, 6).tolist()
    x, y = x - 0.04 * (3 * t + a).sin(), y - 0.03 * (2 * t + b).sin()
    layer, subject = DRAW[kind](dice, Canvas(x / scale, y / scale, t, px / scale))
    shot = "close-up" if scale > 1.03 else "wide shot" if scale < 0.9 else "medium shot"
    alpha = layer.alpha.expand(1, frames, height, width).clamp(0, 1)
    return SyntheticClip(
        rgb=(layer.rgb.expand(3, frames, height, width) * 2 - 1).clamp(-1, 1),
        # What 8 bits round to nothing is nothing, so that a clip and its stored copy have one
        # support.
        alpha=alpha * (alpha >= 1 / 510),
        prompt=f"Transparent background, procedural animation, {shot}: {subject}.",
        kind=kind,
    )


def _strands(
    dice: Dice, place: Tensor, along: Tensor, spacing: Tensor, half: float, px: float
) -> Layer:
    """Draws tapered strands, one a unit of `place`; `along`: 0 at roots, 1 at the longest tip; rgb:
    brightness."""
    lengths, shades = dice.reals(64, 0.55, 1), dice.reals(64, 0.72, 1.15)
    strand = place.floor()
    index = strand.long() % 64
    off = (place - strand - 0.5).abs() * spacing
    reach = half * (1 - along / lengths[index]).clamp(0, 1).sqrt() * (12 * along).clamp(0, 1)
    # A strand thinner than a pixel covers width / px of it: box filter of a strip.
    cover = (torch.minimum(off + px / 2, reach) - torch.maximum(off - px / 2, -reach)) / px
    return Layer(shades[index] * (0.88 + 0.3 * along.clamp(0, 1)), cover.clamp(0, 1))


def _hair(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    return dice.pick((_fur, _lock))(dice, canvas)


def _fur(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    x, y, t, px = canvas
    name, radius, length = dice.pick(list(HAIR)), 0.18, dice.real(0.14, 0.22)
    wind, speed, phase, curl = (
        dice.pick((-1, 1)),
        dice.real(5, 9),
        dice.real(0, 6),
        dice.real(0.2, 1.4),
    )
    ball = torch.hypot(x, y)
    bend = ((ball - 0.1) / (0.08 + length)).clamp(0, 1.2).square() * length
    qx = x - bend * wind * (0.15 + 0.3 * (speed * t + phase).sin())
    qy = y - bend * dice.real(0, 0.35)
    r, turn = torch.hypot(qx, qy), torch.atan2(qy, qx) / (2 * math.pi)
    layer = Layer(WHITE, inside(ball - radius, px))
    for root in (0.95, 0.9, 0.85, 0.62):
        along = (r - root * radius) / (length + 0.05 * (0.95 - root))
        wave = curl * (dice.real(2, 5) * along + dice.real(0, 6) + dice.real(3, 6) * t).sin()
        place = 64 * (turn + dice.real(0, 1)) + wave * along.clamp(min=0)
        layer = stack(layer, _strands(dice, place, along, r * (math.pi / 32), 0.009, px))
    light = layer.rgb * (
        1.22 - 0.3 * torch.hypot(x / radius + 0.5, y / radius + 0.6).clamp(max=1.7)
    )
    layer = Layer((color(HAIR[name]) * light).clamp(0, 1), layer.alpha)
    look = 0.1 * wind * (0.4 * speed * t).sin()
    for side in (-1, 1):
        ex, ey, size = x / radius - 0.4 * side, y / radius + 0.05, px / radius
        pupil = inside(torch.hypot(ex - look, ey) - 0.19, size)
        glint = inside(torch.hypot(ex - look + 0.07, ey + 0.07) - 0.07, size)
        eye = mix(mix(color("fbfaf5"), color("16131c"), pupil), WHITE, glint)
        layer = stack(layer, Layer(eye, inside(torch.hypot(ex, ey) - 0.33, size)))
    pace = "quickly" if speed > 7 else "gently"
    return (
        layer,
        f"furry creature with {name} hair swaying {pace} to the {'left' if wind < 0 else 'right'}",
    )


def _lock(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    x, y, t, px = canvas
    name, (ribbon, silk, *_) = dice.pick(list(HAIR)), dice.colors()
    wind, speed, phase, curl = (
        dice.pick((-1, 1)),
        dice.real(4, 8),
        dice.real(0, 6),
        dice.real(0.2, 1.8),
    )
    y = y + 0.28
    h = y / 0.72
    low = h.clamp(0, 1.1)
    axis = low**1.4 * (0.07 * wind + 0.11 * (speed * t + phase - 2.4 * low).sin())
    width = 0.045 + dice.real(0.3, 0.44) * low.sqrt() * (1 - 0.6 * low)
    u = (x - axis) / width
    core = (u.abs() - 0.85 * (1 - h / 0.66).clamp(0, 1).sqrt()) * width
    mass = core.maximum(-y).maximum(h - 0.6).minimum(torch.hypot(x / 1.2, y + 0.02) - 0.055)
    layer, along = Layer(0.72 * WHITE, inside(mass, px)), torch.where(u.abs() < 1, h, 2)
    for _ in range(4):
        count = dice.integer(20, 30)
        wave = curl * low * (dice.real(4, 8) * h + dice.real(0, 6) - dice.real(3, 6) * t).sin()
        place = u * (count / 2) + dice.real(0, 64) + wave
        layer = stack(layer, _strands(dice, place, along, width * (2 / count), 0.008, px))
    shine = 1 + 0.4 * (1 - ((h - 0.24 - 0.05 * (5 * u).cos()) / 0.1).square()).clamp(min=0)
    light = layer.rgb * shine * (1.05 - 0.25 * u.clamp(-1, 1))
    layer = Layer((color(HAIR[name]) * light).clamp(0, 1), layer.alpha)
    flap = 0.25 * (speed * t + phase).sin()
    for side in (-1, 1):
        bx, by = rotate(x, y, side * (0.35 + flap))
        fold = 0.72 + 0.45 * ((bx.abs() - 0.02) / 0.16).clamp(0, 1)
        loop = torch.hypot((bx - 0.085 * side) / 1.7, by) - 0.046
        layer = stack(layer, Layer((silk * fold).clamp(max=1), inside(loop, px)))
    layer = stack(layer, Layer(silk, inside(torch.hypot(x, y) - 0.034, px)))
    curls = "curly" if curl > 1 else "straight"
    return layer, f"lock of {curls} {name} hair with {ribbon} bow, waving in the wind"


def _glass(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    t, size = canvas.t, 0.38
    name, tint, near, far = dice.colors()
    shape = dice.pick(("sphere", "goblet", "bottle", "bubble"))
    x, y = rotate(
        canvas.x / size, canvas.y / size, 0.2 * (dice.real(3, 6) * t + dice.real(0, 6)).sin()
    )
    px, glide, thin = canvas.px / size, 0.12 * (4 * t).sin(), 0.16 if shape == "bubble" else 0.3
    # A solid of revolution with half width w(y): n = |x| / w is the sine of its angle to the
    # viewer.
    if shape in ("sphere", "bubble"):
        n = torch.hypot(x, y)
        distance = n - 1
    else:
        if shape == "goblet":
            bowl = (1 - ((y + 0.35) / 0.72).square()).clamp(min=0).sqrt() * 0.62
            width = bowl.maximum(0.07 + 0.4 * smoothstep(0.8, 1, y))
        else:
            width = 0.42 + 0.2 * (2.6 * y + 0.2).sin() + 0.05 * (5 * y).cos()
        n = x.abs() / width
        middle, half = (0.1, 0.9) if shape == "goblet" else (0, 1)
        distance = (x.abs() - width).maximum((y - middle).abs() - half)
    rim = n.clamp(max=1) ** 5
    shine = smoothstep(0.5, 1, 1 - torch.hypot((x + 0.4 + glide) * 2.2, (y + 0.45) * 1.4))
    shine = shine + 0.6 * smoothstep(0.4, 1, 1 - torch.hypot((x - 0.42 + glide) * 4, (y - 0.4) * 3))
    film = 0.5 + 0.5 * (3 * x + 2 * y + 3 * t).sin()
    rgb = mix(tint, far if shape == "bubble" else near, 0.7 * film)
    rgb = mix(rgb, WHITE, 0.35) if shape in ("goblet", "bottle") else rgb
    rgb = mix(mix(rgb, WHITE, 0.55 * rim), WHITE, shine.clamp(max=1))
    alpha = inside(distance, px) * (thin + 0.6 * rim + (0.95 - thin) * shine).clamp(max=0.97)
    layer = Layer(rgb, alpha)
    if shape in ("goblet", "bottle"):
        level = (-0.5 if shape == "goblet" else 0) + 0.25 * (6 * t).sin() * x
        drink = (distance + 0.07).maximum(level - y).maximum(y - (0.3 if shape == "goblet" else 1))
        layer = stack(
            Layer(near * (1.05 - 0.3 * (y - level)).clamp(max=1), 0.8 * inside(drink, px)), layer
        )
    return layer, f"{name} glass {shape} tilting, with bright rim and moving highlights"


def _smoke(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    x, y, t, _ = canvas
    shade, style = dice.pick(list(SMOKE)), dice.pick(("plume", "plume", "cloud"))
    way, speed, thick = dice.pick((-1, 1)), dice.real(0.35, 0.75), dice.real(1.1, 2.6)
    count, tile = 14, dice.noise(3)
    swirl = look_up(tile, 0.8 * x, 0.8 * y + 0.6 * speed * t) - 0.5
    u, v = x + 0.2 * swirl[:1], y + 0.2 * swirl[1:2]
    grain = look_up(tile[:, 2:], 1.3 * u, 1.3 * v + speed * t)
    born = torch.arange(count).view(-1, 1, 1, 1, 1) / count
    side, jitter = (
        dice.reals(count, *span).view(-1, 1, 1, 1, 1) for span in ((-1, 1), (0.85, 1.25))
    )
    age = (born + speed * t) % 1  # puffs leave one after another: (count, 1, T, 1, 1)
    if style == "plume":
        fade = smoothstep(0, 0.08, age) * smoothstep(0, 0.55, 1 - age)
        px, py = way * (0.26 * age**1.4 - 0.1) + 0.16 * side * age, 0.38 - 0.68 * age
        size = (0.075 + 0.19 * age) * jitter
    else:
        fade = smoothstep(0, 0.4, age) * smoothstep(0, 0.4, 1 - age)
        px, py = 0.26 * side + way * 0.16 * (age - 0.5), 0.1 * (9 * side).sin() - 0.08 * age + 0.05
        size = 0.19 * jitter + 0 * age
    body = lit = torch.zeros(())
    for a, b, radius, strength in zip(px, py, size, fade, strict=True):
        du, dv = (u - a) / radius, (v - b) / radius
        puff = strength * (1 - du.square() - dv.square()).clamp(min=0)
        body, lit = body + puff, lit - puff * (0.5 * du + 0.6 * dv)
    alpha = 0.92 * smoothstep(0, thick, body * (0.4 + 1.2 * grain) - 0.35 * (1 - grain))
    light = 0.8 + 0.5 * lit / body.clamp(min=0.05) + 0.4 * (grain - 0.5)
    motion = (
        f"{'rising' if style == 'plume' else 'drifting'} {'quickly' if speed > 0.55 else 'slowly'}"
    )
    subject = f"{style} of {shade} smoke {motion} to the {'left' if way < 0 else 'right'}"
    return Layer((color(SMOKE[shade]) * light).clamp(0, 1), alpha), subject


def _flame(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    x, y, t, px = canvas
    name, style = dice.pick(list(FLAMES)), dice.pick(("flame", "campfire", "candle"))
    calm = 0.45 if style == "candle" else 1.0
    lean, speed, tile = calm * dice.real(-0.16, 0.16), dice.real(0.8, 1.4), dice.noise(2)
    tongues, bottom = {  # (left, height, half width) of each tongue
        "flame": ([(0.0, 0.84, 0.24)], 0.42),
        "campfire": ([(0.0, 0.74, 0.19), (-0.15, 0.5, 0.13), (0.15, 0.55, 0.13)], 0.34),
        "candle": ([(0.0, 0.48, 0.12)], 0.06),
    }[style]
    lick = look_up(tile, 0.9 * x, 0.6 * y + speed * t) - 0.5
    heat = torch.zeros(())
    for left, height, half in tongues:
        h = (bottom - y) / height
        up = h.clamp(0, 1)
        u = x - left - lean * up.square() + 0.5 * calm * lick[:1] * up
        width = 2 * half * (up + 0.01).sqrt() * (1.001 - up).pow(0.85)
        flare = (1 - (u / width).square()).clamp(min=-1) * (1.12 - 0.6 * up)
        flare = flare + calm * lick[1:] * (0.2 + 1.2 * up)
        heat = heat.maximum(flare * smoothstep(0, 0.1, h) * smoothstep(0, 0.1, 1 - h))
    cold, warm, hot, white = (color(code) for code in FLAMES[name])
    rgb = mix(mix(cold, warm, smoothstep(0, 0.4, heat)), hot, smoothstep(0.3, 0.75, heat))
    layer = Layer(mix(rgb, white, smoothstep(0.7, 1.1, heat)), smoothstep(0, 0.5, heat))
    if style == "candle":
        wick = Layer(color("3a2c28"), inside(box(x, y - 0.04, 0.008, 0.05, 0.004), px))
        wax = color("f6ead2") * (1.02 - 0.35 * (10 * x + 0.3).square() + (0.2 - y).clamp(0, 0.15))
        layer = stack(
            stack(wick, layer),
            Layer(wax.clamp(0, 1), inside(box(x, y - 0.26, 0.09, 0.18, 0.02), px)),
        )
    if style == "campfire":
        for turn in (-0.3, 0.3):
            u, v = rotate(x, y - 0.35, turn)
            bark = color("6b4027") * (0.8 - 9 * v + 0.3 * (60 * v + 5 * (9 * u).sin()).sin())
            layer = stack(layer, Layer(bark.clamp(0, 1), inside(box(u, v, 0.27, 0.036, 0.02), px)))
    way = "to the left" if lean < -0.04 else "to the right" if lean > 0.04 else "upwards"
    subject = {"flame": "flame", "campfire": "campfire", "candle": "candle flame"}[style]
    return layer, f"{name} {subject} flickering {way}"


def _particles(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    name, tint, *others = dice.colors()
    second, count, style = dice.pick(others), dice.integer(32, 64), dice.pick(list(SPARKS))
    trail = 6  # every spark is drawn again a little later and fainter behind itself
    angle, reach, born, size, hue = (
        dice.reals(count, 0, 1).repeat(trail)[:, None] for _ in range(5)
    )
    delay = torch.arange(trail).repeat_interleave(count)[:, None] / trail
    angle, clock = 2 * math.pi * angle, canvas.t.view(1, -1) - delay / 10  # (N, 1), (N, T)
    if style == "burst":
        age = (clock / 1.1 + 0.1 * born + 0.15) % 1
        go = (0.08 + 0.36 * reach) * (1 - (1 - age) ** 2.5)
        px, py = angle.cos() * go, angle.sin() * go + 0.14 * age.square() - 0.05
    elif style == "fountain":
        age = (clock / 1.1 + born) % 1
        px, py = 0.36 * angle.cos() * age, 0.38 - (1.3 + 0.9 * reach) * age * (1 - 0.75 * age)
    elif style == "swirl":
        age = (clock / 1.3 + born) % 1
        go = 0.08 + 0.3 * (0.3 * reach + 0.7 * age)
        px, py = (angle + 5 * age).cos() * go, (angle + 5 * age).sin() * go * 0.8
    else:
        age = (clock / 1.6 + born) % 1
        px = 0.36 * (2 * reach - 1) + 0.05 * (7 * age + angle).sin()
        py = 0.3 * angle.sin() + 0.1 - 0.3 * age
    weight = smoothstep(0, 0.08, age) * smoothstep(0, 0.5, 1 - age) * (1 - delay)
    radius = (0.028 + 0.045 * size.square()) * (1 - 0.5 * delay) + 0 * age
    glow = splat(canvas, px, py, radius, torch.stack((weight, weight * hue)))
    core = splat(canvas, px, py, 0.5 * radius, weight[None])
    rgb = mix(tint, second, glow[1:] / glow[:1].clamp(min=1e-4))
    rgb = mix(rgb, WHITE, (0.55 * core).clamp(max=0.9))
    subject = f"{'dense' if count > 47 else 'sparse'} {name} {SPARKS[style]}, sparks fading"
    return Layer(rgb, 1 - (-0.8 * glow[:1] - 1.2 * core).exp()), subject


def _shadow(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    x, y, t, px = canvas
    (look, paint), shape, drop = textured(dice), dice.pick(list(CORNERS)), dice.pick((True, False))
    speed, phase, side = dice.real(4, 7), dice.real(0, 3), dice.pick((-1, 1))
    lift = (speed * t + phase).sin().abs()  # 0 on the ground, 1 at the top
    x = x - 0.07 * (dice.real(1.5, 3) * t + phase).sin()
    if drop:
        radius, fall, turn, top = 0.3, 0.035 + 0.06 * lift, 0.8 * (2 * t + phase).sin(), -0.04
        u, v = rotate((x - side * fall) / radius, (y - top - 1.4 * fall) / radius, turn)
        dark = 1 - smoothstep(-0.06, 0.2, figure(shape, u, v) / (0.8 + 0.6 * lift))
    else:
        radius, turn = 0.2, 2.5 * side * t + phase
        top, spread = 0.1 - 0.26 * lift, radius * (1 + 0.45 * lift)
        dark = 1 - smoothstep(
            0.1, 1.3, torch.hypot((x - 0.1 * side * lift) / spread, (y - 0.3) / (0.33 * spread))
        )
    u, v, size = x / radius, (y - top) / radius, px / radius
    p, q = rotate(u, v, turn)
    caster = Layer(lit(paint(p, q, size), u, v), inside(figure(shape, p, q), size))
    layer = stack(Layer(color("15131f"), (0.75 - 0.3 * lift) * dark), caster)
    return (
        layer,
        f"{look} {shape} "
        f"{'floating over its drop shadow' if drop else 'bouncing over its soft shadow'}",
    )


def _shape(dice: Dice, canvas: Canvas) -> tuple[Layer, str]:
    count, spin, start = (
        dice.pick((1, 1, 2, 3)),
        dice.pick((-1, 1)) * dice.real(1, 4),
        dice.real(0, 6),
    )
    layers, words = [], []
    for i in range(count):
        (look, paint), shape, radius = (
            textured(dice),
            dice.pick(list(CORNERS)),
            (0.36, 0.22, 0.19)[count - 1],
        )
        place, away = (
            start + 2 * math.pi * i / count + 0.6 * spin * canvas.t,
            (0, 0.2, 0.23)[count - 1],
        )
        x, y = (canvas.x - away * place.cos()) / radius, (canvas.y - away * place.sin()) / radius
        u, v = rotate(x, y, spin * canvas.t + dice.real(-0.5, 0.5))
        size = canvas.px / radius
        layers.append(Layer(lit(paint(u, v, size), x, y), inside(figure(shape, u, v), size)))
        words.append(f"{look} {shape}")
    turn = (
        f"turning {'fast' if abs(spin) > 2.5 else 'slowly'} "
        f"{'clockwise' if spin > 0 else 'anticlockwise'}"
    )
    return reduce(stack, layers), f"{' and '.join(words)} {turn}"


DRAW: dict[str, Callable[[Dice, Canvas], tuple[Layer, str]]] = {
    "hair": _hair, "glass": _glass, "smoke": _smoke, "flame": _flame, "particles": _particles,
    "shadow": _shadow, "shape": _shape,
}  # fmt: skip
