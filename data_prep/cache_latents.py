"""Turns clip shards into latent shards: RGBA-VAE latents over drawn backgrounds, the subject's ellipses, prompts."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm
from webdataset.writer import TarWriter

import acetate.commands  # noqa: F401  (registers the resolvers that conf/ uses)
from acetate.alpha import PALETTE_NAMES, harden, over, palette_colors
from acetate.cli import run
from acetate.data.latents import EMPTY_PROMPT, Piece, cut, index_latents, read_latents
from acetate.data.shards import (
    MANIFEST,
    SCHEMA,
    BadClip,
    ShardError,
    finish_tar,
    index_shards,
    read_clip,
    read_manifest,
    read_meta,
    read_meta_text,
    write_json,
)
from acetate.data.store import Folder, listed, open_folder, read_file
from acetate.formats.rgba_vae import load_rgba_vae, read_rgba_vae
from acetate.models.rgba_vae import DECODERS_ONLY, RGBAVAE
from acetate.models.text import TextEncoder
from acetate.regions import fit_ellipses
from acetate.replacing import writing
from data_prep.executor import check, parallel
from data_prep.folders import check_folder, makers, place, settle
from data_prep.ingest import check_budget, print_bad
from data_prep.journal import only_writer
from data_prep.latent_plan import Settings, placement, plan_of

POLL = 0.5  # seconds between looks for the tars of other ranks
IDENTITY = ("vae_sha256", "base_sha256", "text_encoder_sha256", "prompt_length")  # what a trainer compares
# What decides a latent, beside its clip's frames and its place in them; and what decides an embedding, beside the text
OF_A_LATENT = ("seed", "smallest", "dtype", "ellipse", "eps", "frozen_dtype", "vae_sha256", "base_sha256")
OF_A_TEXT = ("dtype", "text_encoder_sha256", "prompt_length", "long_prompts")
log = logging.getLogger(__name__)
Report = Callable[[int, dict[str, str]], None]  # samples done; key -> reason of bad clips
Made = tuple[dict[str, Any], dict[str, Any]]  # what the tar and what the manifest holds


@dataclass(frozen=True)
class Sources:
    """Models, as load_rgba_vae and TextEncoder take them."""

    vae: str
    rgba_vae: str
    text_encoder: str
    prompt_length: int  # tokens that the DiT reads
    frozen_dtype: str  # the VAE computes in
    chunk: int | None = None  # latent frames at a time
    long_prompts: str = "error"  # or truncate: prompts of more than prompt_length tokens

    def __post_init__(self) -> None:
        if self.long_prompts not in ("error", "truncate"):
            raise ValueError(f"long_prompts={self.long_prompts}; choose error or truncate")

    def load_vae(self) -> RGBAVAE:
        vae = load_rgba_vae(vae=self.vae, adapters=self.rgba_vae, chunk=self.chunk, frozen_dtype=self.frozen_dtype)
        if not isinstance(vae, RGBAVAE):
            raise ValueError(f"rgba_vae={self.rgba_vae}: {DECODERS_ONLY}")
        return vae


@dataclass(frozen=True)
class Run:
    """What every process of a run knows."""

    out: Path
    made_by: dict[str, Any]
    sources: Sources
    settings: Settings

    old: Path | None = None  # latents of these settings, of which those of the same clips are taken over
    same_text: bool = False  # and their embeddings, where the prompt is the same

    def part(self, number: int) -> Path:
        return self.out / f"latents-{number:06d}.part.json"

    def part_of(self, shard: Mapping[str, Any], skipped: Mapping[str, str]) -> dict[str, Any]:
        return {"schema": SCHEMA, "made_by": self.made_by, "shard": shard, "skipped": skipped}

    def done(self, number: int) -> dict[str, Any] | None:
        """Part of a finished tar that is still whole."""
        if not self.part(number).exists():
            return None
        part = json.loads(self.part(number).read_text(encoding="utf-8"))
        tar = self.out / part["shard"]["file"]
        return part if tar.exists() and tar.stat().st_size == part["shard"]["bytes"] else None

    def prompt(self, text: str) -> Path:
        """Embeddings lie beside the tars until the manifest is written."""
        parts = json.dumps([self.made_by["settings"]["text_encoder_sha256"], text])
        return self.out / "prompts" / f"{hashlib.sha256(parts.encode()).hexdigest()}.safetensors"


class Encoder:
    """Makes the samples of latent shards; its models stay loaded between tars."""

    def __init__(self, run: Run, vae: RGBAVAE, device: str):
        self.run, self.settings, self.device = run, run.settings, device
        self.vae, self.eps = vae.to(device), run.made_by["settings"]["eps"]
        self.kept = Kept(run.old, run.settings, run.same_text) if run.old else None

    def tar(self, number: int, pieces: Sequence[Piece], report: Report) -> dict[str, str]:
        """Writes tar and part `number` and returns key -> reason of its bad clips."""
        target = self.run.out / f"latents-{number:06d}.tar"
        if self.kept and (shard := self.kept.tar(pieces, target)):
            write_json(self.run.part(number), self.run.part_of(shard, {}))
            report(len(pieces), {})
            return {}
        entries: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        # A name of this process alone: that of one that was thought dead may go on.
        temporary = target.with_name(f"{target.name}.{uuid4().hex[:8]}")
        with writing(target):
            stream = open(temporary, "wb")  # noqa: SIM115  closed below
        tar = TarWriter(stream, encoder=False, mtime=0)
        try:
            for _, group in groupby(pieces, key=lambda piece: piece.ref.key):
                mine = list(group)
                for made in self.clip(mine):
                    if isinstance(made, BadClip):
                        skipped.setdefault(made.key, made.reason)
                        report(0, {made.key: made.reason})
                    else:
                        with writing(target):
                            tar.write(made[0])
                        entries.append(made[1])
                report(len(mine), {})
            with writing(target):
                tar.close()
                stream.close()
            shard = {**finish_tar(temporary), "samples": entries}
        except BaseException:
            for half in (tar, stream):
                with suppress(OSError):  # the disk may be full
                    half.close()
            temporary.unlink(missing_ok=True)
            raise
        write_json(self.run.part(number), self.run.part_of(shard, skipped))
        return skipped

    def clip(self, pieces: Sequence[Piece]) -> Iterator[Made | BadClip]:
        """The samples of one clip; one BadClip alone if it cannot be read."""
        ref = pieces[0].ref
        kept = {piece: found for piece in pieces if self.kept and (found := self.kept.sample(piece))}
        try:
            meta = read_meta(ref)
            frames = torch.from_numpy(read_clip(ref).frames) if len(kept) < len(pieces) else torch.empty(0)
        except BadClip as bad:
            yield bad
            return
        for _, group in groupby(pieces, key=lambda piece: piece.window):
            shown = None
            for piece in group:
                said = {**meta, "clip_crc32": ref.crc32, "background": self.settings.background(piece)}
                if piece in kept:
                    tensors, prompt = kept[piece]
                    if not (self.run.same_text and prompt == meta["prompt"]):
                        tensors |= self.text(meta["prompt"])
                    yield made(piece, tensors, said)
                    continue
                if shown is None or self.settings.smallest < 1:
                    shown = self.view(frames, piece)
                rgb, alpha, ellipses = shown
                latents = self.latents(rgb, alpha, PALETTE_NAMES.index(said["background"]))
                if latents.isfinite().all():
                    tensors = {"latents": latents, "ellipse": ellipses[0].float().cpu(), **self.text(meta["prompt"])}
                    yield made(piece, tensors, said)
                else:
                    where = f"window {piece.window}, variant {piece.variant}"
                    yield BadClip(ref.key, f"{where}: latents are not finite in {self.settings.dtype}")

    def text(self, prompt: str) -> dict[str, Tensor]:
        """What a sample holds of its prompt."""
        embeds = load_file(self.run.prompt(prompt))["embeds"]
        return {"prompt_embeds": embeds, "prompt_mask": torch.ones(len(embeds), dtype=torch.bool)}

    def view(self, frames: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """rgb (1, 3, T, H, W), alpha (1, 1, T, H, W) and ellipses (1, F, 5) of a window as the variant places it."""
        where = placement(self.settings.seed, self.settings.smallest, piece)
        rgb, alpha = (x.to(self.device) for x in cut(frames, piece, where))
        geometry = self.vae.geometry
        return rgb, alpha, fit_ellipses(alpha, geometry.time_stride, geometry.space_stride, **self.settings.ellipse)

    @torch.inference_mode()
    def latents(self, rgb: Tensor, alpha: Tensor, color: int) -> Tensor:
        """(C, F, h, w), normalised, on the CPU, in the stored dtype."""
        hidden = palette_colors(torch.tensor([color], device=rgb.device))
        raw = self.vae.encode(over(rgb, harden(alpha, self.eps), hidden), alpha)
        return self.vae.normalise(raw)[0].to(self.settings.torch_dtype).cpu().contiguous()


class Kept:
    """Samples of an older folder, made with settings that give the same latents, whose clips and windows are the same.

    same_text: its prompts were embedded in the same way, too.
    """

    def __init__(self, folder: Path, settings: Settings, same_text: bool):
        self.folder, self.settings, self.same_text = folder, settings, same_text
        manifest = read_manifest(folder, "latents")
        self.refs = {ref.key: ref for ref in index_latents(folder, manifest)}
        self.shards = {shard["samples"][0]["key"]: shard for shard in manifest["shards"] if shard["samples"]}

    def meta(self, piece: Piece) -> dict[str, Any] | None:
        """The JSON of a piece's sample; None unless it is of the same frames."""
        ref = self.refs.get(piece.key)
        wanted = {**place_of(piece), "clip_crc32": piece.ref.crc32}
        with suppress(BadClip):
            if ref and wanted.items() <= (meta := read_meta(ref)).items():
                return meta
        return None

    def sample(self, piece: Piece) -> tuple[dict[str, Tensor], str] | None:
        """The tensors of a piece, and the prompt that is among them."""
        if (meta := self.meta(piece)) is None:
            return None
        with suppress(BadClip):  # damaged since
            tensors = read_latents(self.refs[piece.key])
            return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, meta["prompt"]
        return None

    def tar(self, pieces: Sequence[Piece], target: Path) -> dict[str, Any] | None:
        """What the manifest says of a tar that would be the same to the bit, and is now there, too."""
        shard = self.shards.get(pieces[0].key)
        if not (shard and self.same_text and [made["key"] for made in shard["samples"]] == [p.key for p in pieces]):
            return None
        source = self.folder / shard["file"]
        try:
            for piece in pieces:
                said = {"clip_crc32": piece.ref.crc32, "background": self.settings.background(piece)}
                if read_meta_text(self.refs[piece.key]) != text_of(piece, {**read_meta(piece.ref), **said}):
                    return None
            if source.stat().st_size != shard["bytes"]:
                return None
        except (BadClip, OSError):
            return None
        target.unlink(missing_ok=True)
        with writing(target):
            try:
                os.link(source, target)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, target)
        return {**shard, "file": target.name}


def place_of(piece: Piece) -> dict[str, Any]:
    """Which sample of which clip it is."""
    own = {name: getattr(piece, name) for name in ("window", "start", "frames", "height", "width", "variant")}
    return {"clip": piece.ref.key, **own}


def text_of(piece: Piece, meta: Mapping[str, Any]) -> bytes:
    """The JSON of a sample."""
    whole = {**meta, **place_of(piece), "split": piece.ref.split}
    return json.dumps(whole, ensure_ascii=False, sort_keys=True).encode()


def made(piece: Piece, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> Made:
    data = save(tensors)
    common = {"clip": piece.ref.key, "variant": piece.variant, "split": piece.ref.split}
    sizes = {"shape": list(tensors["latents"].shape[1:]), "tokens": len(tensors["prompt_embeds"])}
    member = {"__key__": piece.key, "safetensors": data, "json": text_of(piece, meta)}
    return member, {"key": piece.key, **common, **sizes, "crc32": crc32(data)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over threads round differently with their number, and the bytes must not; more processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def cache_latents(
    *,
    shards: Sequence[Folder],
    out: Path,
    sources: Sources,
    settings: Settings,
    allow_empty_buckets: bool,
    bad_clip_budget: int,
    device: str,
    executor: str,
    workers: int,
    gpus: float,
    replace: bool = False,
) -> dict[str, Any] | None:
    """Writes the latent shards and returns their manifest; a run that was interrupted makes what is missing.

    executor, workers, gpus as in data_prep.executor.parallel. Under torchrun each rank makes its part and rank 0 the
    manifest; the others return None. A folder that already holds these very latents is left as it is. One whose clips
    are the same but for their prompts gets the new ones, and keeps its latents. Any other is made anew with `replace`,
    which keeps the latents that would come out the same; else ShardError, as if the clip shards cannot be used or none
    of their clips can. ValueError for sizes, lengths and prompts that the models cannot take; TooManyBad past the
    budget.
    """
    check(executor, workers)
    check_folder(out, shards)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    refs, vae = index_shards(shards), sources.load_vae()
    pieces, facts = plan_of(refs, settings, vae.geometry, allow_empty_buckets)
    devices = devices_for(device, spread=workers > 0 and executor == "local")
    encoder = TextEncoder(sources.text_encoder, sources.prompt_length, devices[0])
    wanted = made_by(shards, sources, settings, vae, encoder)
    old, same_text = reusable(out, wanted)
    again = Kept(out, settings, same_text) if old is not None else None
    new_prompts = old is not None and again is not None and only_prompts(again, old, wanted, pieces)
    folder = place(out, wanted, replace or new_prompts)
    kept = again if folder != out else None
    run = Run(folder, wanted, sources, settings, old=out if kept else None, same_text=same_text)
    if kept and rank == 0:
        count = sum(kept.meta(piece) is not None for piece in pieces)
        log.info("%d of %d latents are taken over from %s", count, len(pieces), out)
    if (folder / MANIFEST).exists():
        if rank == 0:
            tidy(run)
            settle(folder, out)
        return read_manifest(out, "latents") if rank == 0 else None
    with only_writer(out, rank):  # each rank writes tars of its own
        jobs = [pieces[i : i + settings.per_tar] for i in range(0, len(pieces), settings.per_tar)]
        todo = {number: jobs[number] for number in range(rank, len(jobs), world) if not run.done(number)}
        if todo or rank == 0:  # a rank without work may come after the manifest
            embed_prompts(run, encoder, [piece for job in todo.values() for piece in job], kept)
        del encoder
        torch.cuda.empty_cache()  # the VAE, also that of other processes, needs the room
        bad: dict[str, str] = {}
        with tqdm(total=sum(map(len, todo.values())), unit="sample", disable=rank > 0) as bar:

            def report(count: int, skipped: dict[str, str]) -> None:
                for key in skipped.keys() - bad.keys():
                    log.warning("skipped clip %s: %s", key, skipped[key])
                bad.update(skipped)
                check_budget(bad, bad_clip_budget)
                bar.update(count)

            for number in range(len(jobs)):
                report(0, (run.done(number) or {"skipped": {}})["skipped"])
            if executor == "local" and not workers:
                maker = Encoder(run, vae, devices[0])
                for number, job in todo.items():
                    maker.tar(number, job, report)
            elif todo:
                del vae
                places = devices if executor == "local" else [device]  # Ray shows each worker its own GPUs
                setup = partial(start_worker, run, places)
                run_jobs(todo, setup, executor, workers, gpus, report)
        if rank > 0:
            return None
        manifest = finish(run, len(jobs), facts, bad_clip_budget)
        settle(folder, out)
        return manifest


def made_by(
    shards: Sequence[Folder], sources: Sources, settings: Settings, vae: RGBAVAE, encoder: TextEncoder
) -> dict[str, Any]:
    """All that decides the content, as JSON reads it back."""
    identity = (vae.latents_sha256(), vae.base_sha256, encoder.sha256(), sources.prompt_length)
    content = {
        **asdict(settings),
        **dict(zip(IDENTITY, identity, strict=True)),
        "frozen_dtype": sources.frozen_dtype,
        **({"long_prompts": sources.long_prompts} if sources.long_prompts != "error" else {}),
        "eps": read_rgba_vae(sources.rgba_vae)[2]["eps"],
        "shards_sha256": sorted(hashlib.sha256(read_file(folder, MANIFEST)).hexdigest() for folder in shards),
    }
    return json.loads(json.dumps({"command": "data_prep.cache_latents", "settings": content}))


def reusable(out: Path, made_by: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The settings of a finished folder that give the latents of these, and whether its embeddings are alike, too."""
    if not (out / MANIFEST).exists():
        return None, False
    found = next(makers(out))
    if found == made_by or found.get("command") != made_by["command"]:
        return None, False
    old, new = found["settings"], made_by["settings"]
    if any(old.get(name) != new[name] for name in OF_A_LATENT):
        return None, False
    return old, all(old.get(name) == new.get(name) for name in OF_A_TEXT)


def only_prompts(kept: Kept, old: Mapping[str, Any], made_by: Mapping[str, Any], pieces: Sequence[Piece]) -> bool:
    """Whether nothing but the clips' descriptions can be new: no sample comes or goes, and none has other frames."""
    new = made_by["settings"]
    if any(old.get(name) != new.get(name) for name in (old.keys() | new.keys()) - {"shards_sha256"}):
        return False
    return kept.refs.keys() == {piece.key for piece in pieces} and all(map(kept.meta, pieces))


def devices_for(device: str, spread: bool) -> list[str]:
    """auto: under torchrun this process's GPU; with `spread` all GPUs, else the first; the CPU where there is none."""
    if device != "auto":
        return [device]
    if not torch.cuda.is_available():
        return ["cpu"]
    if "LOCAL_RANK" in os.environ or not spread:
        return [f"cuda:{os.environ.get('LOCAL_RANK', 0)}"]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def embed_prompts(run: Run, encoder: TextEncoder, pieces: Sequence[Piece], kept: Kept | None) -> None:
    """Every distinct prompt once, the empty one too, but those that kept samples hold. ValueError as check_lengths."""
    with writing(run.out / "prompts"):
        (run.out / "prompts").mkdir(parents=True, exist_ok=True)
    prompts = {"": [""]}
    for _, group in groupby(pieces, key=lambda piece: piece.ref.key):
        mine = list(group)
        with suppress(BadClip):  # counted where the clip is read
            text = read_meta(mine[0].ref)["prompt"]
            if not (kept and kept.same_text and all((kept.meta(p) or {}).get("prompt") == text for p in mine)):
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


def run_jobs(
    jobs: Mapping[int, Sequence[Piece]],
    setup: Callable[[int], Encoder],
    executor: str,
    workers: int,
    gpus: float,
    report: Report,
) -> None:
    results = parallel(
        work,
        jobs.items(),
        executor=executor,
        workers=workers,
        setup=setup,
        name=lambda job: f"latents-{job[0]:06d}.tar",
        gpus=gpus,
    )
    with closing(results):
        for pieces, bad in zip(jobs.values(), results, strict=True):
            report(len(pieces), bad)


def start_worker(run: Run, devices: Sequence[str], number: int) -> Encoder:
    torch.set_num_threads(1)  # as in `one_thread`
    (device,) = devices_for(devices[number % len(devices)], spread=False)
    return Encoder(run, run.sources.load_vae(), device)


def work(encoder: Encoder, job: tuple[int, Sequence[Piece]]) -> dict[str, str]:
    return encoder.tar(*job, lambda count, bad: None)


def finish(run: Run, jobs: int, facts: Mapping[str, Any], bad_clip_budget: int) -> dict[str, Any]:
    """Waits for the tars of all ranks and writes the manifest."""
    parts: dict[int, dict[str, Any]] = {}
    with tqdm(total=jobs, unit="tar", desc="all ranks", disable=None if jobs else True) as bar:
        while len(parts) < jobs:
            new = {n: part for n in range(jobs) if n not in parts and (part := run.done(n))}
            parts |= new
            bar.update(len(new))
            time.sleep(0 if new else POLL)
    skipped = {key: reason for n in range(jobs) for key, reason in parts[n]["skipped"].items()}
    check_budget(skipped, bad_clip_budget)
    if not any(part["shard"]["samples"] for part in parts.values()):
        tidy(run)
        for made in run.out.glob("latents-*"):
            made.unlink()
        with suppress(OSError):  # other files of it stay
            run.out.rmdir()
        first = "; ".join(f"{key}: {reason}" for key, reason in list(skipped.items())[:3])
        raise ShardError(f"no latents could be made of the clips ({first}). Repair their shards, or make them anew.")
    with writing(run.out / EMPTY_PROMPT):
        shutil.copyfile(run.prompt(""), run.out / EMPTY_PROMPT)
    manifest = manifest_of(run, [parts[n]["shard"] for n in range(jobs)], dict(sorted(skipped.items())), facts)
    write_json(run.out / MANIFEST, manifest)
    tidy(run)
    return manifest


def tidy(run: Run) -> None:
    """Removes what a finished folder has no use for, also where a run was killed before it came to that."""
    shutil.rmtree(run.out / "prompts", ignore_errors=True)
    for half in run.out.glob("latents-*.tar.*"):
        half.unlink(missing_ok=True)


def manifest_of(
    run: Run, shards: list[dict[str, Any]], skipped: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    samples = [sample for shard in shards for sample in shard["samples"]]
    geometry = facts["geometry"]
    buckets = {name: counts([]) for name in facts["empty_buckets"]}
    by_shape = sorted(samples, key=lambda sample: sample["shape"])
    for (frames, height, width), group in groupby(by_shape, key=lambda sample: sample["shape"]):
        sides = (1 + (frames - 1) * geometry["time_stride"], *(n * geometry["space_stride"] for n in (height, width)))
        buckets["x".join(map(str, sides))] = counts(list(group))
    content = run.made_by["settings"]
    facts = {**{name: content[name] for name in (*IDENTITY, "ellipse")}, **facts}
    del facts["empty_buckets"]
    return {
        "schema": SCHEMA, "kind": "latents", "made_by": run.made_by, **facts, **counts(samples),
        "skipped": skipped, "buckets": buckets, "shards": shards,
    }  # fmt: skip


def counts(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of samples, of clips, and of clips per split."""
    split = {sample["clip"]: sample["split"] for sample in samples}
    splits = {name: list(split.values()).count(name) for name in ("train", "val")}
    return {"samples": len(samples), "clips": len(split), "splits": splits}


def main(cfg: DictConfig) -> None:
    own, remote = OmegaConf.to_container(cfg, resolve=True), instantiate(cfg.remote)
    names = ("seed", "variants", "area", "max_aspect", "space_multiple", "dtype", "ellipse", "per_tar", "smallest")
    manifest = cache_latents(
        shards=[open_folder(place, remote) for place in listed(cfg.shards)],
        out=Path(cfg.out),
        sources=Sources(
            vae=cfg.wan.vae,
            rgba_vae=cfg.rgba_vae,
            text_encoder=cfg.wan.text_encoder,
            prompt_length=cfg.wan.prompt_length,
            frozen_dtype=cfg.wan.dtype,
            chunk=cfg.chunk,
            long_prompts=cfg.long_prompts,
        ),
        settings=Settings(
            **{name: own[name] for name in names},
            frames=own["frames"],
            sizes=own["sizes"],
        ),
        allow_empty_buckets=cfg.allow_empty_buckets,
        bad_clip_budget=cfg.bad_clip_budget,
        device=cfg.device,
        executor=cfg.executor,
        workers=cfg.workers,
        gpus=cfg.gpus,
        replace=cfg.replace,
    )
    if manifest is not None:
        print_summary(Path(cfg.out), manifest)


def print_summary(out: Path, manifest: Mapping[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    text = "{samples} samples of {clips} clips, {unused_frames} frames left over, {short_clips} clips forth and back"
    if most := manifest.get("most_enlarged"):
        text += f", {{enlarged_clips}} clips enlarged, up to {most:.3g} times a side"
    console.print(f"{out}: {text.format(**manifest)}", soft_wrap=True)
    table = Table("bucket (frames x height x width)", "samples", "clips", "train", "val")
    for bucket, count in manifest["buckets"].items():
        numbers = (count["samples"], count["clips"], count["splits"]["train"], count["splits"]["val"])
        table.add_row(bucket, *map(str, numbers))
    console.print(table)
    print_bad(console, manifest["skipped"], out / MANIFEST)


if __name__ == "__main__":
    run("prep cache_latents")
