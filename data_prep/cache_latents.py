"""Turns clip shards into latent shards: RGBA-VAE latents over drawn backgrounds, or the plain VAE's
of colour and alpha, the subject's ellipses, prompts."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data.keys import first_reasons
from acetate.data.latent_shards import EMPTY_PROMPT
from acetate.data.manifests import IDENTITY
from acetate.data.shards import MANIFEST, SCHEMA, ShardError, index_shards, read_manifest
from acetate.data.store import Folder, listed, open_folder
from acetate.models.image_encoder import ImageEncoder
from acetate.models.plain_vae import PlainVAE
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.text import TextEncoder
from acetate.replacing import write_json, writing
from data_prep.bad_clips import BadClips, print_bad
from data_prep.executor import check, parallel
from data_prep.folders import check_folder, making, manifests_sha256, tidy
from data_prep.kept_latents import find_kept
from data_prep.latent_encoder import Encoder, Report, Run, Sources, embed_prompts
from data_prep.latent_plan import Piece, Settings, plan_of

OF_A_MANIFEST = (*IDENTITY, "ellipse", "condition", "image_encoder")  # of what decides the content
POLL = 0.5  # seconds between looks for the tars of other ranks
log = logging.getLogger(__name__)
Jobs = Mapping[int, Sequence[Piece]]  # number of a tar -> what it holds
Encode = Callable[[Jobs, Report], None]


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over threads round differently with their number, and the bytes must not; more processes
    use the cores."""
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
    """Writes the latent shards and returns their manifest; an interrupted run makes what is
    missing.

    executor, workers, gpus: as in data_prep.executor.parallel. Under torchrun each rank makes its
    part and rank 0 the manifest; the others return None. A folder that holds these very latents is
    left as it is; one whose clips have other prompts alone gets those; any other is made anew with
    `replace`, which keeps the latents that would come out the same, else ShardError. Also
    ShardError where no clip can be used, ValueError for sizes, lengths and prompts that the models
    cannot take, TooManyBad past the budget.
    """
    check(executor, workers)
    check_folder(out, shards)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    refs, vae = index_shards(shards), sources.load_vae()
    pieces, facts = plan_of(refs, settings, vae.geometry, allow_empty_buckets)
    devices = devices_for(device, spread=workers > 0 and executor == "local")
    encoder = TextEncoder(sources.text_encoder, sources.prompt_length, devices[0])
    wanted = made_by(shards, sources, settings, vae, encoder)
    kept = find_kept(out, settings, wanted)
    new_prompts = kept is not None and kept.only_prompts_differ(wanted, pieces)
    with making(out, wanted, replace or new_prompts, rank) as folder:
        if folder:
            run = Run(folder, wanted, sources, settings, kept if folder != out else None)
            if run.kept and rank == 0:
                run.kept.tell(pieces)
            starts = range(0, len(pieces), settings.per_tar)
            jobs = [pieces[start : start + settings.per_tar] for start in starts]
            parts = [run.done(number) for number in range(len(jobs))]
            todo = {n: jobs[n] for n in range(rank, len(jobs), world) if not parts[n]}
            if todo or rank == 0:  # a rank without work may come after the manifest
                embed_prompts(run, encoder, chain.from_iterable(todo.values()))
            del encoder
            torch.cuda.empty_cache()  # the VAE, also that of other processes, needs the room
            encode = way_to_encode(run, vae, device, devices, executor, workers, gpus)
            del vae
            make_tars(todo, encode, filter(None, parts), bad_clip_budget, quiet=rank > 0)
            if rank == 0:
                finish(run, len(jobs), facts, bad_clip_budget)
    return read_manifest(out, "latents") if rank == 0 else None


def made_by(
    shards: Sequence[Folder],
    sources: Sources,
    settings: Settings,
    vae: RGBAVAE | PlainVAE,
    encoder: TextEncoder,
) -> dict[str, Any]:
    """Returns all that decides the content, as JSON reads it back."""
    identity = (vae.latents_sha256(), vae.base_sha256, encoder.sha256(), sources.prompt_length)
    own = asdict(settings)
    if settings.condition == "none":
        del own["condition"]  # older folders have none
    elif sources.image_encoder is not None:
        own["image_encoder"] = ImageEncoder(sources.image_encoder).facts()
    content = {
        **own,
        **dict(zip(IDENTITY, identity, strict=True)),
        "frozen_dtype": sources.frozen_dtype,
        **({"long_prompts": sources.long_prompts} if sources.long_prompts != "error" else {}),
        **({"scheme": sources.scheme} if sources.scheme != "rgba" else {}),
        "eps": sources.eps,
        "shards_sha256": sorted(manifests_sha256(shards)),
    }
    return json.loads(json.dumps({"command": "data_prep.cache_latents", "settings": content}))


def devices_for(device: str, spread: bool) -> list[str]:
    """Returns the devices to encode on. auto: under torchrun this process's GPU; with `spread` all
    GPUs, else the first; the CPU where there is none."""
    if device != "auto":
        return [device]
    if not torch.cuda.is_available():
        return ["cpu"]
    if "LOCAL_RANK" in os.environ or not spread:
        return [f"cuda:{os.environ.get('LOCAL_RANK', 0)}"]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def make_tars(
    jobs: Jobs,
    encode: Encode,
    finished: Iterable[dict[str, Any]],
    bad_clip_budget: int,
    quiet: bool,
) -> None:
    """Encodes what is missing. finished: parts of the other tars, whose bad clips count, too."""
    bad = BadClips(bad_clip_budget)
    with tqdm(total=sum(map(len, jobs.values())), unit="sample", disable=quiet) as bar:

        def report(count: int, skipped: dict[str, str]) -> None:
            for key in skipped.keys() - bad.keys():
                log.warning("skipped clip %s: %s", key, skipped[key])
            bad.add(skipped)
            bar.update(count)

        for part in finished:
            report(0, part["skipped"])
        encode(jobs, report)


def way_to_encode(
    run: Run,
    vae: RGBAVAE | PlainVAE,
    device: str,
    devices: Sequence[str],
    executor: str,
    workers: int,
    gpus: float,
) -> Encode:
    """Chooses where to encode: in this process, with this VAE; or in others, which load their
    own."""
    if executor == "local" and not workers:
        return partial(encode_here, Encoder(run, vae, devices[0]))
    places = devices if executor == "local" else [device]  # Ray shows each worker its own GPUs
    return partial(encode_in_processes, partial(start_worker, run, places), executor, workers, gpus)


def encode_here(encoder: Encoder, jobs: Jobs, report: Report) -> None:
    for number, pieces in jobs.items():
        encoder.tar(number, pieces, report)


def encode_in_processes(
    setup: Callable[[int], Encoder],
    executor: str,
    workers: int,
    gpus: float,
    jobs: Jobs,
    report: Report,
) -> None:
    if not jobs:
        return
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


def finish(run: Run, jobs: int, facts: Mapping[str, Any], bad_clip_budget: int) -> None:
    """Waits for the tars of all ranks and writes the manifest."""
    parts: dict[int, dict[str, Any]] = {}
    with tqdm(total=jobs, unit="tar", desc="all ranks", disable=None if jobs else True) as bar:
        while len(parts) < jobs:
            new = {n: part for n in range(jobs) if n not in parts and (part := run.done(n))}
            parts |= new
            bar.update(len(new))
            time.sleep(0 if new else POLL)
    skipped = {key: reason for n in range(jobs) for key, reason in parts[n]["skipped"].items()}
    BadClips(bad_clip_budget).add(skipped)
    if not any(part["shard"]["samples"] for part in parts.values()):
        tidy(run.out)
        for made in run.out.glob("latents-*"):
            made.unlink()
        with suppress(OSError):  # other files of it stay
            run.out.rmdir()
        raise ShardError(
            f"no latents could be made of the clips ({first_reasons(skipped)}). Repair their "
            "shards, or make them anew."
        )
    with writing(run.out / EMPTY_PROMPT):
        shutil.copyfile(run.prompt(""), run.out / EMPTY_PROMPT)
    shards = [parts[n]["shard"] for n in range(jobs)]
    write_json(run.out / MANIFEST, manifest_of(run, shards, dict(sorted(skipped.items())), facts))


def manifest_of(
    run: Run, shards: list[dict[str, Any]], skipped: Mapping[str, str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    samples = [sample for shard in shards for sample in shard["samples"]]
    geometry = facts["geometry"]
    buckets = {name: counts([]) for name in facts["empty_buckets"]}
    by_shape = sorted(samples, key=lambda sample: sample["shape"])
    joint = run.sources.scheme == "joint"
    for (frames, height, width), group in groupby(by_shape, key=lambda sample: sample["shape"]):
        frames //= 1 + joint  # of colour, and as many of alpha
        sides = (
            1 + (frames - 1) * geometry["time_stride"],
            *(n * geometry["space_stride"] for n in (height, width)),
        )
        buckets["x".join(map(str, sides))] = counts(list(group))
    content = run.made_by["settings"]
    facts = {
        **({"scheme": "joint"} if joint else {}),
        **{name: content[name] for name in OF_A_MANIFEST if name in content},
        **facts,
    }
    del facts["empty_buckets"]
    return {
        "schema": SCHEMA, "kind": "latents", "made_by": run.made_by, **facts, **counts(samples),
        "skipped": skipped, "buckets": buckets, "shards": shards,
    }  # fmt: skip


def counts(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts samples, clips, and clips of each split."""
    split = {sample["clip"]: sample["split"] for sample in samples}
    splits = {name: list(split.values()).count(name) for name in ("train", "val")}
    return {"samples": len(samples), "clips": len(split), "splits": splits}


def main(cfg: DictConfig) -> None:
    own = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    remote = instantiate(cfg.remote)
    sources = Sources(
        frozen_dtype=cfg.wan.dtype,
        **{
            name: cfg.wan[name]
            for name in ("vae", "text_encoder", "image_encoder", "prompt_length")
        },
        **{name: cfg[name] for name in ("rgba_vae", "chunk", "long_prompts", "scheme")},
    )
    same = (
        "allow_empty_buckets", "bad_clip_budget", "device", "executor", "workers", "gpus",
        "replace",
    )  # fmt: skip
    manifest = cache_latents(
        shards=[open_folder(place, remote) for place in listed(cfg.shards)],
        out=Path(cfg.out),
        sources=sources,
        settings=Settings(**{field.name: own[field.name] for field in fields(Settings)}),
        **{name: cfg[name] for name in same},
    )
    if manifest is not None:
        print_summary(Path(cfg.out), manifest)


def print_summary(out: Path, manifest: Mapping[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    text = (
        "{samples} samples of {clips} clips, {unused_frames} frames left over, {short_clips} clips "
        "forth and back"
    )
    if most := manifest.get("most_enlarged"):
        text += f", {{enlarged_clips}} clips enlarged, up to {most:.3g} times a side"
    console.print(f"{out}: {text.format(**manifest)}", soft_wrap=True)
    table = Table("bucket (frames x height x width)", "samples", "clips", "train", "val")
    for bucket, count in manifest["buckets"].items():
        numbers = (
            count["samples"],
            count["clips"],
            count["splits"]["train"],
            count["splits"]["val"],
        )
        table.add_row(bucket, *map(str, numbers))
    console.print(table)
    print_bad(console, manifest["skipped"], out / MANIFEST)


if __name__ == "__main__":
    run("prep cache_latents")
