"""acetate follow pictures=N: do clips of an image-to-video model begin with the picture that they
are given, and do they follow it rather than the prompt?"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig
from PIL import Image

from acetate.alpha import harden, over
from acetate.callbacks.samples import contact_sheet
from acetate.clips import Clip, background_of
from acetate.commands.agreement import Results, alike, colors_of, decided, load_reader, see
from acetate.data import synthetic
from acetate.data.transforms import to_uint8
from acetate.metrics.palette import PaletteQuality
from acetate.models.rgba_vae import RGBAVAE
from acetate.pipeline import RGBAPipeline

SHOWN = 6  # pictures on the sheet
FIRST = 2 * 10**6  # drawing that no demo shard and no other measure has


def drawn(total: int, frames: int, height: int, width: int) -> list[synthetic.SyntheticClip]:
    """Draws clips whose prompts name the subject's colors, each of other colors than the next."""
    clips: list[synthetic.SyntheticClip] = []
    for number in count(FIRST):
        kind = synthetic.KINDS[number % len(synthetic.KINDS)]
        clip = synthetic.render(kind, number, frames, height, width)
        others = [*clips[-1:], *(clips[:1] if len(clips) == total - 1 else [])]
        if decided(clip) and colors_of(clip.prompt) and not any(share(clip, o) for o in others):
            clips.append(clip)
        if len(clips) == total:
            break
    return clips


def share(one: synthetic.SyntheticClip, other: synthetic.SyntheticClip) -> bool:
    """Tells whether a color of one is like a color of the other."""
    return any(alike(a, b) for a in colors_of(one.prompt) for b in colors_of(other.prompt))


def quality(found: Sequence[Clip], wanted: Sequence[Clip]) -> dict[str, float]:
    """Returns alpha's mean absolute error, and PSNR over backgrounds, of first frames."""
    measure, errors = PaletteQuality(), []
    for a, b in zip(found, wanted, strict=True):
        measure.update(*(x[None, :, :1] for x in (a.rgb, a.alpha, b.rgb, b.alpha)))
        errors.append((a.alpha[:, 0].clamp(0, 1) - b.alpha[:, 0]).abs().mean().item())
    return {
        "alpha MAE": sum(errors) / len(errors),
        "PSNR over backgrounds": measure.compute()["psnr"].item(),
    }


@torch.no_grad()
def through_vae(vae: RGBAVAE, picture: Clip, device: str) -> Clip:
    """Returns what the VAE makes of a picture."""
    hard = over(picture.rgb, harden(picture.alpha), background_of("key"))
    rgb, alpha = vae.decode(vae.encode(hard[None].to(device), picture.alpha[None].to(device)))
    return Clip(rgb[0].cpu(), alpha[0].mean(0, keepdim=True).cpu())


def measure_pictures(pipeline: RGBAPipeline, config: DictConfig) -> tuple[Results, Image.Image]:
    """Returns the figures of `config.pictures` held-out pictures, and a sheet of some of them."""
    clips = drawn(config.pictures, config.frames, config.height, config.width)
    prompts = [clip.prompt for clip in clips]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{place}.png" for place in range(len(clips))]
        for clip, file in zip(clips, files, strict=True):
            frame = to_uint8(clip.rgb[:, :1], clip.alpha[:, :1])[0]
            Image.fromarray(frame.numpy()).save(file)
        given = [Clip.read(file) for file in files]
        own = pipeline(prompts, image=files)
        wrong = pipeline([*prompts[1:], prompts[0]], image=files)
    assert isinstance(pipeline.vae, RGBAVAE), "it has encoded the pictures"
    again = [through_vae(pipeline.vae, picture, pipeline.device) for picture in given]
    results: Results = {}
    for name, found in (("first frame", own), ("VAE", again)):
        results |= {f"{name}, {key}": value for key, value in quality(found, given).items()}
    reader, _ = load_reader(Path(config.paths.cache))
    others = [*clips[1:], clips[0]]
    for name, sampled in (("own prompt", own), ("wrong prompt", wrong)):
        colors = see(reader, [(clip.rgb, clip.alpha) for clip in sampled]).colors
        results[f"{name}, color of the picture"] = agreeing(colors, clips)
        if name == "wrong prompt":
            results[f"{name}, color of the prompt"] = agreeing(colors, others)
    rows = [clip for both in zip(own[:SHOWN], wrong, strict=False) for clip in both]
    pictures = [(clip.rgb, clip.alpha) for clip in given[:SHOWN] for _ in range(2)]
    clips = [(clip.prompt, clip.rgb, clip.alpha) for clip in rows]
    title = "every second row: the same picture with another one's prompt"
    return results, contact_sheet(clips, title, given=pictures)


def agreeing(colors: Sequence[str], clips: Sequence[synthetic.SyntheticClip]) -> float:
    """Returns the share of colors that the clips' prompts name, or alike."""
    right = [
        any(alike(found, name) for name in colors_of(clip.prompt))
        for found, clip in zip(colors, clips, strict=True)
    ]
    return sum(right) / len(right)
