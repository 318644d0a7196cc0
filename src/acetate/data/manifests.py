"""Rules for the manifests of clip and latent shards and for the JSON of a clip."""

import re
from typing import Any

from acetate.data.keys import KEY
from acetate.documents import FieldError, Schema, many, names, prose, reasons, shown
from acetate.settings import Rule, flag, number, one_of, optional, several, text, whole


def count(low: int, high: int) -> Rule:
    """Makes a rule as settings.whole does, but a fast one: a manifest may hold millions of
    numbers."""
    return Rule(whole(low, high).says, lambda value: type(value) is int and low <= value <= high)


MOST_PIXELS = 2**31  # of all frames of a clip: 8 GiB decoded
PROMPT = prose(100_000)
SPLIT = one_of("train", "val")
SIDE = count(1, 2**16)
COUNT = count(0, 2**40)
CRC32 = Rule("a whole number from 0 to 2^32 - 1", count(0, 2**32 - 1).holds)
HASH = Rule(
    "64 digits of hexadecimal",
    lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
)
TAR = Rule(
    "the name of a .tar in the same folder, of letters, digits, _, - and dots",
    lambda value: (
        isinstance(value, str)
        and bool(re.fullmatch(r"[\w-][\w.-]*\.tar", value))
        and len(value.encode()) <= 255
    ),
)
# what latents were made with, said both in the manifest and in its made_by
IDENTITY = ("vae_sha256", "base_sha256", "text_encoder_sha256", "prompt_length")
MADE_BY = Schema({}, {"command": text, "settings": names})
HEAD = {"schema": count(0, 2**31), "made_by": names, "skipped": reasons, "splits": names}
BEFORE_SHARDS = Schema({"made_by": names, "skipped": reasons}, HEAD)
MANIFESTS = {
    "clips": Schema(
        {"clips": COUNT, "shards": many}, {**HEAD, "kind": one_of("clips"), "frames": COUNT}
    ),
    "latents": Schema(
        {
            "vae_sha256": text, "base_sha256": text, "text_encoder_sha256": text,
            "prompt_length": count(1, 2**20), "ellipse": names, "geometry": names, "shards": many,
        },
        {
            **HEAD, "samples": COUNT, "clips": COUNT, "buckets": names, "scheme": text,
            "image_encoder": names,
        },
    ),
}  # fmt: skip
IMAGE_ENCODER = Schema({"sha256": text, "tokens": count(1, 2**16), "width": count(1, 2**16)})
GEOMETRY = Schema(
    {"channels": count(1, 2**16), "time_stride": count(1, 1024), "space_stride": count(1, 1024)}
)
SHARD = {"file": TAR, "bytes": count(0, 2**50), "sha256": HASH}
SHARDS = {
    kind: Schema({**SHARD, listed: many}, open=False)
    for kind, listed in (("clips", "clips"), ("latents", "samples"))
}
ENTRIES = {
    "clips": Schema(
        {
            "key": KEY, "split": SPLIT, "frames": count(1, 2**24), "width": SIDE, "height": SIDE,
            "kind": one_of("rgba.mkv", "rgba.png"), "crc32": CRC32,
        },
        open=False,
    ),
    "latents": Schema(
        {
            "key": KEY, "clip": KEY, "variant": count(0, 2**16), "split": SPLIT,
            "shape": several(SIDE, 3, 3), "tokens": count(0, 2**20), "crc32": CRC32,
        },
        open=False,
    ),
}  # fmt: skip
CLIP = Schema(
    {"prompt": PROMPT},
    {
        "fps": number(0, 1e6), "frames": count(1, 2**24), "width": SIDE, "height": SIDE,
        "source": PROMPT, "licence": PROMPT, "split": SPLIT, "lossy": flag,
        "premultiplied_source": optional(flag), "done": reasons, "clip": KEY,
        "window": COUNT, "start": COUNT, "variant": count(0, 2**16), "clip_crc32": CRC32,
        "background": text,
    },
)  # fmt: skip


def check_manifest(manifest: Any, kind: str) -> None:
    """Raises FieldError for the first field that breaks its rule. kind: clips or latents."""
    MANIFESTS[kind].check(manifest)
    if kind == "latents":
        GEOMETRY.check(manifest["geometry"], "geometry")
        if "image_encoder" in manifest:
            IMAGE_ENCODER.check(manifest["image_encoder"], "image_encoder")
    if "made_by" in manifest:
        MADE_BY.check(manifest["made_by"], "made_by")
    said = manifest.get("made_by", {}).get("settings", {})
    for name in IDENTITY if kind == "latents" else ():
        if name in said and said[name] != manifest[name]:
            raise FieldError(
                f"{name}={shown(manifest[name])}: must be that of made_by.settings, "
                f"{shown(said[name])}"
            )
    listed = "clips" if kind == "clips" else "samples"
    for number_of, shard in enumerate(manifest["shards"]):
        place = f"shards[{number_of}]"
        SHARDS[kind].check(shard, place)
        for index, entry in enumerate(shard[listed]):
            ENTRIES[kind].check(entry, f"{place}.{listed}[{index}]")
            if kind == "latents":
                frames, height, width = entry["shape"]
            else:
                frames, height, width = entry["frames"], entry["height"], entry["width"]
            if frames * height * width > MOST_PIXELS:
                raise FieldError(
                    f"{place}.{listed}[{index}] is {frames}x{height}x{width} (frames x height x "
                    f"width): must be at most {MOST_PIXELS:,} pixels over all frames"
                )
