"""Opaque moving backgrounds for procedural clips, which are drawn without any."""

import math

from torch import Tensor

from acetate.data.drawing import Dice, canvas_of, inside, look_up, mix, rotate, splat


def background(seed: int, frames: int, height: int, width: int) -> Tensor:
    """Opaque moving backgrounds with a natural spread of scales: (3, T, H, W) in [-1, 1]."""
    canvas, dice = canvas_of(frames, height, width), Dice("background", seed)
    style = dice.pick(("plain", "gradient", "stripes", "noise", "noise", "noise", "blobs", "blobs", "checker"))
    first, second, third = dice.reals(9, 0, 1).view(3, 3, 1, 1, 1)
    vivid = dice.real(0.1, 1)
    first, second, third = (mix(colour.mean(), colour, vivid) for colour in (first, second, third))
    step, drift, tile = (
        dice.real(0.1, 0.4),
        dice.real(-0.5, 0.5),
        dice.noise(4, dice.real(1.1, 1.8), cycles=32),
    )
    u, v = rotate(canvas.x, canvas.y, dice.real(0, 6))
    u, clock = u + drift * canvas.t, canvas.t.view(1, -1)
    if style == "plain":
        rgb = first
    elif style == "gradient":
        rgb = mix(first, second, 0.5 + 0.5 * (2 * u).sin())
    elif style == "stripes":
        rgb = mix(first, second, inside((((u / step).remainder(1) - 0.5).abs() - 0.25) * step, canvas.px))
    elif style == "checker":
        edge = (math.pi * u / step).sin() * (math.pi * v / step).sin() * step / math.pi
        rgb = mix(first, second, inside(edge, canvas.px))
    elif style == "blobs":
        cx, cy, radius = dice.reals(36, -0.7, 0.7).view(3, 12, 1)
        px, py = cx + 0.15 * (3 * clock + 9 * cy).sin(), cy + 0.15 * (2 * clock + 9 * cx).cos()
        weight = dice.reals(36, -0.8, 0.8).view(3, 12, 1).expand(3, 12, frames)
        rgb = first + splat(canvas, px, py, (radius.abs() + 0.1).expand(12, frames), weight)
    else:
        field = look_up(tile, 0.5 * u, 0.5 * v + 0.1 * canvas.t)
        rgb = mix(mix(first, second, 1.8 * field[:1] - 0.4), third, (2.5 * field[1:2] - 1).clamp(0, 1))
    grain = look_up(tile[:, 2:], u, v) - 0.5
    rgb = rgb + dice.real(0, 0.3) * grain[:1] + dice.real(0, 0.1) * (first - second) * grain[1:]
    return (rgb.clamp(0, 1) * 2 - 1).expand(3, frames, height, width).contiguous()
