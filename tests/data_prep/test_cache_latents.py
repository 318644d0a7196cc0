from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from acetate.alpha import PALETTE_NAMES, harden, over, palette_colors
from acetate.data.latent_shards import EMPTY_PROMPT, index_latents, read_latents
from acetate.data.latents import LatentDataModule
from acetate.data.shards import (
    index_shards,
    read_clip,
    read_meta,
)
from acetate.models.loading import load_vae
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.text import TextEncoder
from acetate.regions import coverage, fit_ellipses
from data_prep.cache_latents import made_by
from data_prep.latent_plan import Piece, background, cut
from tests.compose import called
from tests.data_prep.cached_latents import (  # noqa: F401
    CLIPS,
    ELLIPSE,
    EPS,
    SETTINGS,
    adapters,
    cached,
    clip,
    clips,
    make,
    manifest_of,
    sources,
)
from tests.original import wan_alpha_state
from tests.paths import ROOT


def test_manifest(cached, sources, clips):
    manifest, vae = manifest_of(cached), sources.load_vae()
    assert (manifest["schema"], manifest["kind"], manifest["skipped"]) == (1, "latents", {})
    assert (
        manifest["vae_sha256"] == vae.latents_sha256()
        and manifest["base_sha256"] == vae.base_sha256
    )
    assert manifest["text_encoder_sha256"] == TextEncoder(sources.text_encoder, 16).sha256()
    assert manifest["geometry"] == {"channels": 16, "time_stride": 4, "space_stride": 8}
    assert manifest["ellipse"] == ELLIPSE and manifest["prompt_length"] == 16
    assert (manifest["clips"], manifest["samples"], manifest["splits"]) == (
        4,
        10,
        {"train": 3, "val": 1},
    )
    # 12 = 5 + 5 + 2; `short` and `still`
    assert (manifest["unused_frames"], manifest["short_clips"]) == (2, 2)
    assert manifest["buckets"] == {
        "5x16x64": {"samples": 2, "clips": 1, "splits": {"train": 1, "val": 0}},
        "5x64x16": {"samples": 2, "clips": 1, "splits": {"train": 1, "val": 0}},
        "5x32x32": {"samples": 6, "clips": 2, "splits": {"train": 1, "val": 1}},
    }
    made_by = manifest["made_by"]["settings"]
    assert made_by["eps"] == EPS and len(made_by["shards_sha256"]) == 1 and made_by["vae_sha256"]
    assert [len(shard["samples"]) for shard in manifest["shards"]] == [5, 5]
    entry = manifest["shards"][0]["samples"][0]
    assert (entry["key"], entry["clip"], entry["variant"]) == ("long-w000-v0", "long", 0)
    assert (entry["split"], entry["shape"], entry["crc32"] > 0) == ("train", [2, 4, 4], True)
    assert not (cached / "prompts").exists()


def test_samples_equal_a_direct_encode(cached, clips, sources):
    vae, text = sources.load_vae(), TextEncoder(sources.text_encoder, 16)
    clip_refs = {ref.key: ref for ref in index_shards([clips])}
    for ref in index_latents(cached, manifest_of(cached)):
        sample, meta = read_latents(ref), read_meta(ref)
        source = clip_refs[ref.clip]
        piece = Piece(
            source,
            meta["window"],
            meta["start"],
            meta["frames"],
            meta["height"],
            meta["width"],
            ref.variant,
        )
        assert ref.key == piece.key and meta["clip"] == ref.clip and meta["split"] == ref.split
        rgb, alpha = cut(torch.from_numpy(read_clip(source).frames), piece)
        color = palette_colors(torch.tensor([PALETTE_NAMES.index(meta["background"])]))
        with torch.no_grad():
            wanted = vae.normalise(vae.encode(over(rgb, harden(alpha, EPS), color), alpha))[0]
        assert sample["latents"].dtype == torch.float16
        torch.testing.assert_close(sample["latents"].float(), wanted, atol=2e-2, rtol=2e-3)
        assert torch.equal(sample["ellipse"], fit_ellipses(alpha, 4, 8, **ELLIPSE)[0].float())
        covered = coverage(alpha, 4, 8)[0, 0]
        torch.testing.assert_close(sample["coverage"] / 255, covered, atol=0.51 / 255, rtol=0)
        embeds = text(CLIPS[ref.clip][3])
        torch.testing.assert_close(sample["prompt_embeds"].float(), embeds, atol=1e-2, rtol=1e-3)
        assert (
            sample["prompt_mask"].all() and len(sample["prompt_mask"]) == len(embeds) == ref.tokens
        )
        assert (meta["prompt"], meta["source"], meta["licence"]) == (
            CLIPS[ref.clip][3],
            "nowhere",
            "CC0-1.0",
        )
    torch.testing.assert_close(
        load_file(cached / EMPTY_PROMPT)["embeds"].float(), text(""), atol=1e-2, rtol=1e-3
    )


def test_eps_of_the_adapters_counts(cached, clips, sources):
    """Alpha lies below eps outside of the disc: there the encoder sees the background, not the
    colour."""
    ref = index_latents(cached, manifest_of(cached))[0]
    piece = Piece(index_shards([clips])[0], 0, read_meta(ref)["start"], 5, 32, 32, 0)
    _, alpha = cut(torch.from_numpy(clip("long")), piece)
    assert not torch.equal(harden(alpha, EPS), harden(alpha, 0.0))


def test_variants_differ_and_the_seed_decides():
    for key in CLIPS:
        assert sorted(background(0, key, variant) for variant in range(8)) == list(range(8))
    draws = [[background(seed, key, 0) for key in CLIPS] for seed in range(4)]
    assert len(set(map(tuple, draws))) > 1


def test_datamodule_reads_them(cached):
    data = LatentDataModule(latents=str(cached), batch_size=2, seed=0, num_workers=0,
        val_batch_size=2, val_clips=8,
                            prompt_length=16)  # fmt: skip
    data.setup()
    assert data.vae_sha256 == manifest_of(cached)["vae_sha256"]
    batches = iter(data.train_dataloader())
    seen = {key for _ in range(20) for key in next(batches)["key"]}
    # Buckets of a single clip wait two epochs for company: two variants of it
    assert seen == {
        f"{key}-v{v}"
        for key in ("long-w000", "long-w001", "short-w000", "tall-w000")
        for v in (0, 1)
    }
    assert [batch["key"] for batch in data.val_dataloader()] == [["still-w000-v0"]]


@pytest.mark.usefixtures("forked")
def test_how_it_is_run_does_not_matter(make, cached, sources):
    assert make(cached, sources=replace(sources, chunk=1), workers=3) == manifest_of(cached)


def test_chunks_agree(make, cached, sources, tmp_path):
    make(tmp_path / "l", sources=replace(sources, chunk=1))
    for one, other in zip(
        *(index_latents(out, manifest_of(out)) for out in (cached, tmp_path / "l")), strict=True
    ):
        torch.testing.assert_close(
            read_latents(one)["latents"], read_latents(other)["latents"], atol=2e-2, rtol=2e-3
        )


def test_explicit_sizes(make, tmp_path):
    manifest = make(
        tmp_path / "l",
        sizes=((16, 64), (32, 32), (32, 48)),
        allow_empty_buckets=True,
        variants=1,
        dtype="bfloat16",
    )
    assert {name: count["samples"] for name, count in manifest["buckets"].items()} == {
        "5x16x64": 1,
        "5x32x32": 4,
        "5x32x48": 0,
    }
    assert (
        read_latents(index_latents(tmp_path / "l", manifest)[0])["latents"].dtype == torch.bfloat16
    )


def test_command_line(clips, adapters, wan_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    sources = [f"wan.{part}={wan_folder}" for part in ("vae", "text_encoder")]
    out = f"{tmp_path}/l"
    arguments = [
        f"shards={clips}",
        f"out={out}",
        f"rgba_vae={adapters}",
        "wan=wan21_1b",
        *sources,
        "wan.prompt_length=9",
    ]
    settings = [
        "variants=1",
        "frames=[5,9]",
        "sizes=[[32,32]]",
        "ellipse.threshold=0.75",
        "allow_empty_buckets=true",
    ]
    called("prep cache_latents", *arguments, *settings, "device=cpu")
    manifest = manifest_of(tmp_path / "l")
    assert manifest["prompt_length"] == 9 and manifest["ellipse"]["threshold"] == 0.75
    shown = capsys.readouterr().out
    assert (
        "4 samples of 4 clips, 3 frames left over, 2 clips forth and back" in shown
        and "9x32x32" in shown
    )


def test_variants_show_a_clip_smaller_and_elsewhere(make, cached, tmp_path):
    """Ellipses move with the picture; smallest=1 leaves every variant where it was."""
    make(tmp_path / "placed", smallest=0.4)
    moved = {}
    for folder in (cached, tmp_path / "placed"):
        refs = index_latents(folder, manifest_of(folder))
        ellipses = {
            (ref.clip, ref.window, ref.variant): read_latents(ref)["ellipse"] for ref in refs
        }
        windows = {(clip, window) for clip, window, _ in ellipses}
        moved[folder] = [
            not torch.equal(ellipses[*key, 0], ellipses[*key, 1]) for key in sorted(windows)
        ]
    assert not any(moved[cached])
    assert all(moved[tmp_path / "placed"])


def test_one_background_behind_every_clip(make, tmp_path):
    """Variants differ by their place alone; without a place of their own they would be equal."""
    make(tmp_path / "placed", smallest=0.4, background="cyan")
    refs = index_latents(tmp_path / "placed", manifest_of(tmp_path / "placed"))
    assert {read_meta(ref)["background"] for ref in refs} == {"cyan"}
    with pytest.raises(
        ValueError, match=r"variants=2 .* equal over background=cyan; set variants=1"
    ):
        replace(SETTINGS, background="cyan")


@pytest.mark.parametrize("place", [(0.5, 0.0, 0.0), (0.5, 1.0, 1.0), (0.7, 0.5, 0.25)])
def test_placed_picture_is_whole(place, clips):
    """Scale and place, by hand: an opaque square stays whole on the larger canvas."""
    frames = torch.full((1, 32, 32, 4), 255, dtype=torch.uint8)
    piece = Piece(index_shards([clips])[0], 0, 0, 1, 32, 32, 0)
    _, alpha = cut(frames, piece, place)
    scale, above, before = place
    side, slack = 32 * scale, 32 * (1 - scale)
    assert abs(alpha.sum() - side**2) < 0.06 * side**2
    y = (alpha[0, 0, 0].sum(1) * (torch.arange(32) + 0.5)).sum() / alpha.sum()
    x = (alpha[0, 0, 0].sum(0) * (torch.arange(32) + 0.5)).sum() / alpha.sum()
    assert abs(y - (above * slack + side / 2)) < 0.6
    assert abs(x - (before * slack + side / 2)) < 0.6


def test_latents_of_the_released_vae_checkpoint(wan_folder, sources, tmp_path):
    """Its eps is that of the released code; its decoders alone make no latents."""
    state = wan_alpha_state(
        RGBAVAE(vae=load_vae(str(wan_folder)), merge_init="scratch", lora_rank=2, lora_alpha=1.0)
    )
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(
        {name: value for name, value in state.items() if ".lora_" in name}, tmp_path / "decoder.bin"
    )
    released = replace(sources, rgba_vae=str(tmp_path / "pytorch_model.bin"))
    encoder = TextEncoder(sources.text_encoder, sources.prompt_length)
    settings = made_by([], released, SETTINGS, released.load_vae(), encoder)["settings"]
    assert settings["eps"] == 0
    with pytest.raises(
        ValueError, match=r"decoder\.bin: these files hold decoders only, and no merge block"
    ):
        replace(sources, rgba_vae=str(tmp_path / "decoder.bin")).load_vae()
