"""Rendered light becomes straight colour and alpha."""

import numpy as np
from numpy.typing import NDArray

from acetate.media.color import encode_srgb


def straight(rendered: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turns (..., 4), linear light multiplied by coverage, and coverage, into straight colour in
    sRGB and alpha.

    A renderer lays layers over each other in linear light and encodes the sum; acetate.alpha.over,
    like browsers and most editors, lays encoded colour over encoded colour. No one alpha makes both
    equal over every background. So alpha is what two backgrounds tell (triangulation: Smith and
    Blinn 1996, Blue Screen Matting): the render as it is seen over black and over white, B and W,
    gives 1 - (W - B), of which the mean over the colours leaves the least squared error over white.
    Half a cover of white has alpha 0.735, of black 0.265, and what is opaque has 1. Colour is
    B / alpha, so that over black the clip is the render.

    Light that covers nothing has W - B near 1 and yet a colour, the luminescent element of Porter
    and Duff 1984 (4.1). Alpha is therefore at least the largest of B, the smallest for which
    B / alpha is a colour: light becomes the thinnest layer that shows it over black.
    """
    light, cover = np.maximum(rendered[..., :3], 0), rendered[..., 3:].clip(0, 1)
    black = encode_srgb(light.clip(0, 1))
    white = encode_srgb((light + 1 - cover).clip(0, 1))
    seen = 1 - (white - black).mean(-1, keepdims=True)
    alpha = np.rint(255 * np.maximum(seen, black.max(-1, keepdims=True)).clip(0, 1))
    color = (255 * black / np.maximum(alpha / 255, 1 / 255)).clip(0, 255)
    return np.concatenate((np.where(alpha > 0, np.rint(color), 0), alpha), -1).astype(np.uint8)
