"""Every figure that a clip can have: what it says, which way is better, where it comes from."""

from dataclasses import dataclass
from typing import Literal

from acetate.metrics.palette import NAMES

Better = Literal["higher", "lower", "zero", ""]  # "": neither is


@dataclass(frozen=True)
class Figure:
    """title: of a table's row, with the unit. says: in one line. source: paper or code."""

    name: str
    group: str
    title: str
    better: Better
    says: str
    source: str


COMPOSITES, ALPHA, TIME = "Composites", "Alpha", "Alpha over time"
WRONG, ALONE, MOVING = "What is wrong", "Without the truth", "Motion, without the truth"
WANG, RVM, RHEMANN = "Wang et al. 2004", "Lin et al. 2022", "Rhemann et al. 2009, Lin et al. 2022"
EROFEEV, PUBLISHED = "Erofeev et al. 2015", "Wang et al. 2025"
OURS = "this project"
WHERE_MIXED = "where the true alpha is neither 0 nor 1"

POOLED = (
    Figure("psnr", COMPOSITES, "PSNR, dB", "higher",
           "closeness of composites; mean over eight colours and grey, 100 at most", OURS),
    Figure("ssim", COMPOSITES, "SSIM", "higher",
           "likeness of composites' structure; mean over eight colours and grey, 1 at most", WANG),
    Figure("lpips", COMPOSITES, "LPIPS", "lower",
           "difference that VGG16 sees in composites; `lpips=true`", "Zhang et al. 2018"),
    Figure("alphavae_psnr", COMPOSITES, "PSNR as AlphaVAE, dB", "higher",
           "as its table has it: composites cut to 8 bits, after JPEG; 80 at most", PUBLISHED),
    Figure("alphavae_ssim", COMPOSITES, "SSIM as AlphaVAE", "higher",
           "as its table has it: of brightness, after JPEG", PUBLISHED),
    Figure("alphavae_lpips", COMPOSITES, "LPIPS as AlphaVAE", "lower",
           "as its table has it: what AlexNet sees, after JPEG; `lpips=true`", PUBLISHED),
)  # fmt: skip

FIGURES = (
    *POOLED,
    *(
        Figure(f"{figure.name}_{color}", figure.group, f"{figure.title} over {color}",
               figure.better, f"{figure.name} over {color} alone", figure.source)
        for figure in POOLED
        for color in NAMES
    ),
    Figure("premultiplied_mad", COMPOSITES, "premultiplied MAD, x 1e-3", "lower",
           "mean absolute error of alpha times colour, of 1000", OURS),
    Figure("alpha_psnr", ALPHA, "PSNR, dB", "higher", "closeness of alpha, 100 at most", OURS),
    Figure("alpha_ssim", ALPHA, "SSIM", "higher", "likeness of alpha's structure, 1 at most", WANG),
    Figure("sad", ALPHA, "SAD, x 1e3", "lower",
           "sum of absolute errors of a frame's pixels, in thousands", RHEMANN),
    Figure("mad", ALPHA, "MAD, x 1e-3", "lower", "mean absolute error of a pixel, of 1000", RVM),
    Figure("mse", ALPHA, "MSE, x 1e-3", "lower", "mean squared error of a pixel, of 1000", RHEMANN),
    Figure("grad", ALPHA, "gradient, x 1e3", "lower",
           "squared error of the gradient's strength, summed over a frame, in thousands", RHEMANN),
    Figure("conn", ALPHA, "connectivity, x 1e3", "lower",
           "error in how pixels hang together with the subject, in thousands", RHEMANN),
    Figure("sad_mixed", ALPHA, "SAD, mixed", "lower", WHERE_MIXED, RVM),
    Figure("mad_mixed", ALPHA, "MAD, mixed", "lower", WHERE_MIXED, RVM),
    Figure("mse_mixed", ALPHA, "MSE, mixed", "lower", WHERE_MIXED, RVM),
    Figure("grad_mixed", ALPHA, "gradient, mixed", "lower",
           WHERE_MIXED, RVM),
    Figure("conn_mixed", ALPHA, "connectivity, mixed", "lower",
           WHERE_MIXED, RVM),
    Figure("residue", ALPHA, "residue", "lower", "mean alpha where the truth is 0, 0 to 1", OURS),
    Figure("soft_iou", ALPHA, "soft IoU", "higher",
           "sum of the smaller over the sum of the larger alpha, 0 to 1", "Jaccard, Ruzicka 1958"),
    Figure("dtssd", TIME, "dtSSD, x 1e-2", "lower",
           "error of the change from frame to frame", "Erofeev et al. 2015, Lin et al. 2022"),
    Figure("messddt", TIME, "MESSDdt, x 1e-3", "lower",
           "change of the squared error along the true motion (block matching)", EROFEEV),
    Figure("shift_x", WRONG, "shift to the right, px", "zero",
           "pixels that alpha lies to the right of the truth, -2 to 2", OURS),
    Figure("shift_y", WRONG, "shift down, px", "zero",
           "pixels that alpha lies below the truth, -2 to 2", OURS),
    Figure("delay", WRONG, "delay, frames", "zero", "frames that alpha is late, -2 to 2", OURS),
    Figure("multiplied", WRONG, "multiplied", "zero",
           "1: colour was multiplied by alpha once too often; 0: never", OURS),
    Figure("squared", WRONG, "squared", "zero",
           "1: alpha was multiplied by itself; 0: never", OURS),
    Figure("coverage", ALONE, "coverage", "", "mean alpha, 0 to 1", OURS),
    Figure("soft", ALONE, "soft share", "", "share of pixels strictly between 0 and 1", OURS),
    Figure("border", ALONE, "border residue", "lower",
           "mean alpha of the outermost rows and columns, 0 to 1", OURS),
    Figure("background", ALONE, "background residue", "lower",
           "mean alpha more than 16 pixels away from any pixel of alpha 0.5, 0 to 1", OURS),
    Figure("holes", ALONE, "interior holes", "lower",
           "share of the shape that is missing inside of it, 0 to 1; a ring has a true one", OURS),
    Figure("halo", ALONE, "halo", "lower",
           "what composites over black and over white imply of the solid colour at an edge, and "
           "do not agree on; 0 to 0.7", OURS),
    Figure("edge_sharpness", ALONE, "edge sharpness", "",
           "change of alpha a pixel at the contour: 0.5 a cut, 1/w a ramp of w pixels", OURS),
    Figure("flicker", MOVING, "flicker", "lower",
           "alpha that goes and comes back within two frames, along its motion, 0 to 1", OURS),
    Figure("motion_disagreement", MOVING, "motion disagreement", "lower",
           "change of alpha along the motion of colour, 0 to 1", OURS),
    Figure("lag", MOVING, "lag, frames", "zero",
           "frames by which alpha's changes come after those of colour, -3 to 3", OURS),
    Figure("guide_inside", MOVING, "inside the guide", "higher",
           "share of alpha in the guide's ellipse, 0 to 1", OURS),
    Figure("guide_offset", MOVING, "off the guide", "lower",
           "distance of alpha's centre from the guide's, as a share of the shorter side", OURS),
)  # fmt: skip
BY_NAME = {figure.name: figure for figure in FIGURES}
PER_COLOR = {f"{figure.name}_{color}" for figure in POOLED for color in NAMES}
