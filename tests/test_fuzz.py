"""Manifests, clips' JSON, latents, adapters, checkpoints and configs that are damaged: each is
refused by an error that names the file, or read; never another error, 10 s or 2 GiB.

ACETATE_FUZZ=500 makes that many of all kinds together; ACETATE_FUZZ_SEED=7 begins with another
seed. A failure names its kind and seed.
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from zlib import crc32

import pytest
import torch

from acetate.commands.runs import LAST
from acetate.data.latent_shards import index_latents, read_latents
from acetate.data.latents import LatentDataModule
from acetate.data.shards import MANIFEST, index_shards, read_clip, read_manifest
from acetate.formats.checkpoints import read_trained
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.formats.trained import read_whole_adapters
from acetate.models.loading import load_transformer, load_vae
from acetate.models.text import TextEncoder
from data_prep.folders import makers
from tests.conftest import TINY
from tests.fuzz import damaged_json, damaged_safetensors, edited, flipped, outcome_of, seeded
from tests.processes import alone
from tests.test_resumable import go_on

FILES = int(os.environ.get("ACETATE_FUZZ", "60"))
FIRST = int(os.environ.get("ACETATE_FUZZ_SEED", "0"))
LATENTS = {"batch_size": 1, "seed": 0, "num_workers": 0, "val_batch_size": 1, "val_clips": 1}


def repacked(folder, out, suffix, change):
    """A copy of a folder of shards whose first member of a suffix is changed, and its CRC put
    right."""
    shutil.copytree(folder, out)
    manifest = json.loads((out / MANIFEST).read_text())
    shard = manifest["shards"][0]
    tar = out / shard["file"]
    with tarfile.open(tar) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}
    name = next(name for name in members if name.endswith(suffix))
    members[name] = change(members[name])
    with tarfile.open(tar, "w") as archive:
        for member, data in members.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    key = name.split(".")[0]
    for entry in shard.get("clips", shard.get("samples")):
        if entry["key"] == key and suffix != ".json":
            entry["crc32"] = crc32(members[name])
    (out / MANIFEST).write_text(json.dumps(manifest))
    return key


def of_clips(shards, out, random):
    shutil.copytree(shards, out)
    text = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(damaged_json(text, random))
    return lambda: [read_clip(ref) for ref in index_shards([out]) if not ref.problem][:0], MANIFEST


def of_makers(shards, out, random):
    shutil.copytree(shards, out)
    text = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(damaged_json(text, random))
    return lambda: list(makers(out)), MANIFEST


def of_latents(latents, out, random):
    shutil.copytree(latents, out)
    text = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(damaged_json(text, random))
    data = LatentDataModule(latents=str(out), prompt_length=64, bad_clip_budget=99, **LATENTS)
    return lambda: [data.setup(), next(iter(data.train_dataloader()))], str(out)


def of_clip_json(shards, out, random):
    key = repacked(shards, out, ".json", lambda data: damaged_json(data, random))
    return lambda: [read_clip(ref) for ref in index_shards([out]) if ref.key == key], key


def of_latent_tensors(latents, out, random):
    key = repacked(latents, out, ".safetensors", lambda data: damaged_safetensors(data, random))
    refs = index_latents(out, read_manifest(out, "latents"))
    return lambda: [read_latents(ref, 64) for ref in refs if ref.key == key], key


def of_vae_adapters(adapters, out, random):
    out.mkdir()
    (out / "a.safetensors").write_bytes(damaged_safetensors(adapters.read_bytes(), random))
    file = str(out / "a.safetensors")
    read = random.choice((read_trained, lambda f: load_rgba_vae(vae=TINY, adapters=f)))
    return lambda: read(file), "a.safetensors"


def of_dora(dora, out, random):
    out.mkdir()
    (out / "a.safetensors").write_bytes(damaged_safetensors(dora.read_bytes(), random))
    file = str(out / "a.safetensors")
    read = random.choice((read_trained, lambda f: read_whole_adapters(f, "dit_dora")))
    return lambda: read(file), "a.safetensors"


def of_checkpoints(checkpoint, out, random):
    out.mkdir()
    file = out / "a.ckpt"
    if random.random() < 0.3:
        file.write_bytes(flipped(checkpoint.read_bytes(), random))
    else:
        torch.save(edited(torch.load(checkpoint, weights_only=True), random), file)
    return lambda: read_trained(str(file)), "a.ckpt"


def of_resume(sound, out, random):
    checkpoint, cached = sound
    out.mkdir()
    torch.save(edited(torch.load(checkpoint, weights_only=True), random), out / "a.ckpt")
    return lambda: go_on(out, cached, out / "a.ckpt"), "a.ckpt"


def of_configs(base, out, random):
    part = random.choice(("vae", "transformer", "text_encoder"))
    shutil.copytree(base, out)
    file = out / part / "config.json"
    file.write_bytes(damaged_json(file.read_bytes(), random))
    load = {"vae": load_vae, "transformer": load_transformer,
            "text_encoder": lambda source: TextEncoder(source, 64)}[part]  # fmt: skip
    return lambda: load(str(out)), str(out / part)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_damaged_files_are_refused_by_name_or_read(shards, cached, dora, tmp_path):
    counts, wrong = alone(fuzzed, shards, cached, dora, tmp_path, within=3500)
    print(f"seeds {FIRST} to {FIRST + FILES - 1}: {counts}")
    assert not wrong, "\n".join(wrong)
    assert min(counts.values()) > 0


def fuzzed(shards, cached, dora, folder):
    """How many files were accepted and refused, and what else became of others."""
    latents, adapters = cached
    checkpoint = checkpoint_of(dora, folder / "sound.ckpt")
    kinds = ((of_clips, shards), (of_makers, shards), (of_latents, latents), (of_clip_json, shards),
             (of_latent_tensors, latents), (of_vae_adapters, adapters), (of_dora, dora),
             (of_checkpoints, checkpoint), (of_configs, Path(TINY)),
             (of_resume, (folder / "run" / LAST, cached)))  # fmt: skip
    read_trained(str(checkpoint))
    go_on(folder / "run", cached, None, steps=2)
    counts, wrong = {"accepted": 0, "refused": 0}, []
    for seed in range(FIRST, FIRST + FILES):
        kind, source = kinds[seed % len(kinds)]
        out = folder / str(seed)
        action, name = kind(source, out, seeded(seed))
        outcome = outcome_of(action, name)
        if outcome.sound:
            counts[outcome.said.partition(":")[0]] += 1
        else:
            wrong.append(f"seed {seed}, {kind.__name__}: {outcome}")
        shutil.rmtree(out)
    return counts, wrong


def checkpoint_of(adapters, file):
    """What a run of experiment=dit_dora saves, as far as others read it."""
    _, state, facts = read_whole_adapters(str(adapters), "dit_dora")
    state = {f"transformer.{name}": value for name, value in state.items()}
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    average = {name: value.clone() for name, value in state.items()}
    torch.save(
        {"global_step": 3, "state_dict": state, "adapter_metadata": metadata,
         "callbacks": {"EMA": {"average": average}}},
        file,
    )  # fmt: skip
    return file
