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
from acetate.commands.program import program
from acetate.data.latents import EMPTY_PROMPT, Piece, cut
from acetate.data.shards import (
    MANIFEST,
    SCHEMA,
    BadClip,
    ClipRef,
    ShardError,
    finish_tar,
    index_shards,
    read_clip,
    read_manifest,
    read_meta,
    write_json,
)
from acetate.data.store import Folder, listed, open_folder, read_file
from acetate.formats.rgba_vae import load_rgba_vae, read_rgba_vae
from acetate.models.rgba_vae import DECODERS_ONLY, RGBAVAE
from acetate.models.text import TextEncoder
from acetate.regions import fit_ellipses
from data_prep.executor import check, parallel
from data_prep.ingest import check_budget, print_bad
from data_prep.journal import only_writer
from data_prep.latent_plan import Settings, background, placement, plan_of

POLL = 0.5  # seconds between looks for the tars of other ranks
IDENTITY = ("vae_sha256", "base_sha256", "text_encoder_sha256", "prompt_length")  # what a trainer compares
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

    def part(self, number: int) -> Path:
        return self.out / f"latents-{number:06d}.part.json"

    def done(self, number: int) -> dict[str, Any] | None:
        """Part of a finished tar that is still whole."""
        if not self.part(number).exists():
            return None
        part = json.loads(self.part(number).read_text())
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

    def tar(self, number: int, pieces: Sequence[Piece], report: Report) -> dict[str, str]:
        """Writes tar and part `number` and returns key -> reason of its bad clips."""
        entries: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        # A name of this process alone: that of one that was thought dead may go on.
        temporary = self.run.out / f"latents-{number:06d}.tar.{uuid4().hex[:8]}"
        with open(temporary, "wb") as stream, closing(TarWriter(stream, encoder=False, mtime=0)) as tar:
            for _, group in groupby(pieces, key=lambda piece: piece.ref.key):
                mine = list(group)
                for made in self.clip(mine):
                    if isinstance(made, BadClip):
                        skipped.setdefault(made.key, made.reason)
                        report(0, {made.key: made.reason})
                    else:
                        tar.write(made[0])
                        entries.append(made[1])
                report(len(mine), {})
        shard = {**finish_tar(temporary), "samples": entries}
        part = {"schema": SCHEMA, "made_by": self.run.made_by, "shard": shard, "skipped": skipped}
        write_json(self.run.part(number), part)
        return skipped

    def clip(self, pieces: Sequence[Piece]) -> Iterator[Made | BadClip]:
        """The samples of one clip; one BadClip alone if it cannot be read."""
        try:
            clip, meta = read_clip(pieces[0].ref), read_meta(pieces[0].ref)
        except BadClip as bad:
            yield bad
            return
        embeds = load_file(self.run.prompt(clip.prompt))["embeds"]
        prompt = {"prompt_embeds": embeds, "prompt_mask": torch.ones(len(embeds), dtype=torch.bool)}
        frames = torch.from_numpy(clip.frames)
        for _, group in groupby(pieces, key=lambda piece: piece.window):
            mine = list(group)
            rgb, alpha, ellipses = self.view(frames, mine[0])
            for piece in mine:
                if self.settings.smallest < 1:
                    rgb, alpha, ellipses = self.view(frames, piece)
                color = background(self.settings.seed, piece.ref.key, piece.variant)
                latents = self.latents(rgb, alpha, color)
                if latents.isfinite().all():
                    tensors = {"latents": latents, "ellipse": ellipses[0].float().cpu(), **prompt}
                    yield made(piece, tensors, {**meta, "background": PALETTE_NAMES[color]})
                else:
                    where = f"window {piece.window}, variant {piece.variant}"
                    yield BadClip(piece.ref.key, f"{where}: latents are not finite in {self.settings.dtype}")

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


def made(piece: Piece, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> Made:
    data = save(tensors)
    common = {"clip": piece.ref.key, "variant": piece.variant, "split": piece.ref.split}
    own = {name: getattr(piece, name) for name in ("window", "start", "frames", "height", "width")}
    text = json.dumps({**meta, **common, **own}, ensure_ascii=False, sort_keys=True)
    sizes = {"shape": list(tensors["latents"].shape[1:]), "tokens": len(tensors["prompt_embeds"])}
    member = {"__key__": piece.key, "safetensors": data, "json": text.encode()}
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
) -> dict[str, Any] | None:
    """Writes the latent shards and returns their manifest; a run that was interrupted makes what is missing.

    executor, workers, gpus as in data_prep.executor.parallel. Under torchrun each rank makes its part and rank 0 the
    manifest; the others return None. A folder that already holds these very latents is left as it is; ShardError if it
    holds others, or if the clip shards cannot be used. ValueError for sizes, lengths and prompts that the models cannot
    take; TooManyBad past the budget.
    """
    check(executor, workers)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    refs, vae = index_shards(shards), sources.load_vae()
    pieces, facts = plan_of(refs, settings, vae.geometry, allow_empty_buckets)
    devices = devices_for(device, spread=workers > 0 and executor == "local")
    encoder = TextEncoder(sources.text_encoder, sources.prompt_length, devices[0])
    run = Run(out, made_by(shards, sources, settings, vae, encoder), sources, settings)
    if finished := check_folder(run):
        if rank == 0:
            tidy(run)
        return finished if rank == 0 else None
    with only_writer(out, rank):  # each rank writes tars of its own
        jobs = [pieces[i : i + settings.per_tar] for i in range(0, len(pieces), settings.per_tar)]
        todo = {number: jobs[number] for number in range(rank, len(jobs), world) if not run.done(number)}
        if todo or rank == 0:  # a rank without work may come after the manifest
            embed_prompts(run, encoder, {piece.ref.key: piece.ref for job in todo.values() for piece in job})
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
        return finish(run, len(jobs), facts, bad_clip_budget) if rank == 0 else None


def made_by(
    shards: Sequence[Folder], sources: Sources, settings: Settings, vae: RGBAVAE, encoder: TextEncoder
) -> dict[str, Any]:
    """All that decides the content, as JSON reads it back."""
    identity = (vae.latents_sha256(), vae.base_sha256, encoder.sha256(), sources.prompt_length)
    content = {
        **asdict(settings),
        **dict(zip(IDENTITY, identity, strict=True)),
        "frozen_dtype": sources.frozen_dtype,
        "eps": read_rgba_vae(sources.rgba_vae)[2]["eps"],
        "shards_sha256": sorted(hashlib.sha256(read_file(folder, MANIFEST)).hexdigest() for folder in shards),
    }
    return json.loads(json.dumps({"command": "data_prep.cache_latents", "settings": content}))


def check_folder(run: Run) -> dict[str, Any] | None:
    """The manifest of a finished folder; ShardError if anything in it was made otherwise."""
    manifest = read_manifest(run.out, "latents") if (run.out / MANIFEST).exists() else None
    for found in [manifest or {}, *(json.loads(part.read_text()) for part in run.out.glob("latents-*.part.json"))]:
        if found and found["made_by"] != run.made_by:
            old, new = found["made_by"]["settings"], run.made_by["settings"]
            other = ", ".join(name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
            raise ShardError(
                f"{run.out} holds latents that were made otherwise ({other}). Name another folder or remove it first."
            )
    return manifest


def devices_for(device: str, spread: bool) -> list[str]:
    """auto: under torchrun this process's GPU; with `spread` all GPUs, else the first; the CPU where there is none."""
    if device != "auto":
        return [device]
    if not torch.cuda.is_available():
        return ["cpu"]
    if "LOCAL_RANK" in os.environ or not spread:
        return [f"cuda:{os.environ.get('LOCAL_RANK', 0)}"]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def embed_prompts(run: Run, encoder: TextEncoder, refs: Mapping[str, ClipRef]) -> None:
    """Every distinct prompt once, the empty one too; ValueError names the clip whose prompt is too long."""
    (run.out / "prompts").mkdir(parents=True, exist_ok=True)
    prompts = {"": ""}
    for key, ref in refs.items():
        with suppress(BadClip):  # counted where the clip is read
            prompts.setdefault(read_meta(ref)["prompt"], key)
    missing = {text: key for text, key in prompts.items() if not run.prompt(text).exists()}
    for text, key in tqdm(missing.items(), unit="prompt", disable=not missing):
        try:
            embeds = encoder(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        stored = embeds.to(run.settings.torch_dtype)
        if not stored.isfinite().all():
            raise ValueError(f"{key}: its prompt's embedding is not finite in {run.settings.dtype}; use dtype=bfloat16")
        path = run.prompt(text)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(save({"embeds": stored}))
        temporary.replace(path)


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


@program("prep/cache_latents")
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
        ),
        settings=Settings(
            **{name: own[name] for name in names},
            frames=tuple(own["frames"]),
            sizes=own["sizes"] and tuple((height, width) for height, width in own["sizes"]),
        ),
        allow_empty_buckets=cfg.allow_empty_buckets,
        bad_clip_budget=cfg.bad_clip_budget,
        device=cfg.device,
        executor=cfg.executor,
        workers=cfg.workers,
        gpus=cfg.gpus,
    )
    if manifest is not None:
        print_summary(Path(cfg.out), manifest)


def print_summary(out: Path, manifest: Mapping[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    text = "{samples} samples of {clips} clips, {unused_frames} frames left over, {short_clips} clips forth and back"
    console.print(f"{out}: {text.format(**manifest)}", soft_wrap=True)
    table = Table("bucket (frames x height x width)", "samples", "clips", "train", "val")
    for bucket, count in manifest["buckets"].items():
        numbers = (count["samples"], count["clips"], count["splits"]["train"], count["splits"]["val"])
        table.add_row(bucket, *map(str, numbers))
    console.print(table)
    print_bad(console, manifest["skipped"], out / MANIFEST)


if __name__ == "__main__":
    main()
