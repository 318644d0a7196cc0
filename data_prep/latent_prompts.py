"""Embeds the prompts of clips for latent shards, each text once."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby

from safetensors.torch import save
from tqdm import tqdm

from acetate.data.shards import BadClip, read_meta
from acetate.models.text import TextEncoder
from acetate.replacing import writing
from data_prep.latent_encoder import Run
from data_prep.latent_plan import Piece

log = logging.getLogger(__name__)


def embed_prompts(run: Run, encoder: TextEncoder, pieces: Iterable[Piece]) -> None:
    """Every distinct prompt once, the empty one too, but those that kept samples hold. ValueError as check_lengths."""
    with writing(run.out / "prompts"):
        (run.out / "prompts").mkdir(parents=True, exist_ok=True)
    prompts = {"": [""]}
    for _, group in groupby(pieces, key=lambda piece: piece.ref.key):
        mine = list(group)
        with suppress(BadClip):  # counted where the clip is read
            text = read_meta(mine[0].ref)["prompt"]
            if not (run.kept and all(run.kept.has_text(piece, text) for piece in mine)):
                prompts.setdefault(text, []).append(mine[0].ref.key)
    missing = {text: keys[0] for text, keys in prompts.items() if not run.prompt(text).exists()}
    truncate = run.sources.long_prompts == "truncate"
    check_lengths(encoder, {text: prompts[text] for text in missing}, truncate)
    for text, key in tqdm(missing.items(), unit="prompt", disable=not missing):
        stored = encoder(text, truncate).to(run.settings.torch_dtype)
        if not stored.isfinite().all():
            raise ValueError(f"{key}: its prompt's embedding is not finite in {run.settings.dtype}; use dtype=bfloat16")
        path = run.prompt(text)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with writing(path):
            temporary.write_bytes(save({"embeds": stored}))
            temporary.replace(path)


def check_lengths(encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], truncate: bool) -> None:
    """prompts: text -> keys of its clips. ValueError, or with `truncate` a warning, names all that are too long."""
    counts = {text: encoder.tokens(text) for text in prompts}
    long = [(key, n) for text, n in counts.items() if n > encoder.length for key in prompts[text]]
    if not long:
        return
    named = ", ".join(f"{key} ({count})" for key, count in sorted(long))
    said = f"{len(long)} clips have prompts of more tokens than the {encoder.length} that the DiT reads: {named}"
    if truncate:
        log.warning("%s. Their first %d are read", said, encoder.length)
        return
    raise ValueError(
        f"{said}. Shorten them (data_prep.caption prompts=FILE overwrite=all), or give long_prompts=truncate to read "
        "the beginning alone."
    )
