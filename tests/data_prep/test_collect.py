"""Packages as their clients unpack them, made here: tables with prompts, licences and groups, cut
sheets, refusals."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from acetate.data.splits import assign_splits
from acetate.video_io import open_rgba
from data_prep.collect import collect
from data_prep.emoji import codes_of, described, group_of
from data_prep.ingest import ingest
from data_prep.packages import DEBIAN, EMOJI, terms_of
from data_prep.sprites import with_light

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2011-2021 Ann Author <ann@example.org>
License: CC-BY-SA-3.0+
 Some words.

Files: images/effect/*
       mods/other/*
Copyright: 2020 Bob Maker
License: public-domain
"""


def picture(seed, size=12):
    """Smooth straight colour with a soft disc of alpha, RGBA."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    alpha = np.clip(4 * (0.45 - np.hypot(x, y + 0.02 * seed)), 0, 1)
    rgba = np.stack([np.full_like(x, (40 * seed) % 255 / 255), x + 0.5, y + 0.5, alpha], axis=-1)
    return Image.fromarray(np.rint(255 * rgba).astype(np.uint8))


def npm(folder, stems, name=EMOJI[0], still=()):
    assets = folder / "node_modules" / name / "assets"
    assets.mkdir(parents=True)
    about = {"name": name, "version": "1.0.0", "license": "MIT", "author": "Lob <l@example.org>"}
    (assets.parent / "package.json").write_text(json.dumps(about))
    for number, stem in enumerate(stems):
        first, *rest = (picture(number + frame) for frame in range(1 if stem in still else 3))
        more = {"save_all": True, "append_images": rest, "duration": 40} if rest else {}
        first.save(assets / f"{stem}.webp", lossless=True, **more)
    return folder


def debian(folder, kind):
    name, data = DEBIAN[kind]
    about, root = folder / "usr/share/doc" / name, folder / "usr/share/games" / data
    about.mkdir(parents=True)
    root.mkdir(parents=True)
    (about / "copyright").write_text(COPYRIGHT)
    with gzip.open(about / "changelog.Debian.gz", "wt") as file:
        file.write(f"{name} (1.14-1) unstable; urgency=medium\n")
    return root


def numbered(folder, pattern, count, size=12):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, size).save(folder / pattern.format(number))


def rows(out):
    return [json.loads(line) for line in (out / "table.jsonl").read_text().splitlines()]


TONED = ["1f44b", "1f44b-1f3fb", "1f44b-1f3fd", "1f44b-1f3ff"]
FARMERS = ["1f468-1f3fb-200d-1f33e", "1f469-1f3ff-200d-1f33e", "1f9d1-200d-1f33e"]
FLAGS = ["1f1e9-1f1ea", "1f1eb-1f1f7", "1f3f4-e0067_e0062_e0073_e0063_e0074"]
RUNNERS = ["1f3c3-200d-2640-fe0f", "1f3c3-1f3fc-200d-2642-fe0f"]


@pytest.mark.parametrize(
    ("stem", "shows"),
    [
        ("1f525", "fire"),
        ("1f469-1f3fd-200d-1f33e", "woman farmer, medium skin tone"),
        ("1f3c3-1f3fb-200d-2640-fe0f", "woman runner, light skin tone"),
        ("1f473-200d-2640-fe0f", "woman with turban"),
        ("0035-fe0f-20e3", "keycap 5"),
        ("1f1e9-1f1ea", "flag with the country code DE"),
        ("1f3f4-e0067_e0062_e0073_e0063_e0074", "flag with the region code GBSCT"),
        ("2764-fe0f-200d-1f525", "heart and fire"),
    ],
)
def test_code_points_in_words(stem, shows):
    assert described(codes_of(stem)) == shows


@pytest.mark.parametrize("variants", [TONED, FARMERS, FLAGS, RUNNERS, ["1f930", "1fac3", "1fac4"]])
def test_variants_are_one_group(variants):
    assert len({group_of(codes_of(stem)) for stem in variants}) == 1


def test_emoji_are_ingested_with_their_groups_whole(tmp_path):
    stems = [*TONED, *FARMERS, *FLAGS, *RUNNERS, "1f525", "1f4a8", "1f60a"]
    npm(tmp_path / "down", stems[:7])
    npm(tmp_path / "down", [*stems[7:], "1f697"], EMOJI[1], still=("1f697",))
    out = tmp_path / "emoji"
    found, bad, notes = collect(kind="emoji", source=tmp_path / "down", out=out)
    assert (len(found), bad) == (len(stems), {})  # without the car, which stands still
    assert len(notes) == 2 and "1.0.0" in notes[0] and "not in the recipe" in notes[0]
    made = ingest(source=out, out=tmp_path / "m.jsonl", bad_clip_budget=0)
    assert {clip.licence for clip in made.clips} == {"MIT"}
    assert {clip.frames for clip in made.clips} == {3}
    fire = next(clip for clip in made.clips if "1f525" in clip.key)
    assert fire.prompt == "Transparent background, animated 3D emoji: fire."
    assert fire.source == f"{EMOJI[1]} 1.0.0: assets/1f525.webp; by Lob"
    for fraction in (0.2, 0.5, 0.8):
        sides = assign_splits({clip.key: clip.group for clip in made.clips}, fraction)
        for variants in (TONED, FARMERS, FLAGS, RUNNERS):
            ends = tuple(stem.replace("-200d", "").replace("-fe0f", "") for stem in variants)
            mine = {side for key, side in sides.items() if key.endswith(ends)}
            assert len(mine) == 1


def test_few_of_a_group_and_stills(tmp_path):
    npm(tmp_path, [*TONED, "1f525"], still=("1f525",))
    found, *_ = collect(
        kind="emoji", source=tmp_path, out=tmp_path / "o", moving="all", per_group=2
    )
    assert [one.row["group"] for one in found].count("emoji waving hand") == 2
    assert any(one.row["prompt"] == "Transparent background, 3D emoji: fire." for one in found)


SHEET = """
image=images/powers/blast.png

[power]
frames=3
duration=300ms
type=back_forth
frame=0,0,0,0,12,12,6,6
frame=1,0,12,0,12,12,6,6
frame=2,0,24,0,6,12,3,6
frame=0,1,0,0,12,12,6,6
"""


def test_a_sheet_is_cut_by_its_description(tmp_path):
    root = debian(tmp_path, "flare")
    sheet = Image.new("RGBA", (36, 12))
    for number in range(3):
        sheet.paste(picture(number), (12 * number, 0))
    for folder in ("animations/powers", "images/powers"):
        (root / "mods/core" / folder).mkdir(parents=True)
    sheet.save(root / "mods/core/images/powers/blast.png")
    (root / "mods/core/animations/powers/blast.txt").write_text(SHEET)
    out = tmp_path / "flare"
    collect(kind="flare", source=tmp_path, out=out)
    (row,) = rows(out)  # the other direction lacks two frames
    assert row["prompt"] == (
        "Transparent background, animated game sprite: blast, powers of a fantasy game."
    )
    assert (row["licence"], row["author"]) == ("CC-BY-SA-3.0+", "Ann Author")
    assert "flare-game 1.14-1: mods/core/images/powers/blast.png" in row["source"]
    clip = open_rgba(out / row["file"])
    frames = list(clip)
    assert clip.fps == pytest.approx(1000 / 75) and len(frames) == 4
    cut = np.asarray(sheet)
    seen = cut[:, :12, 3:] > 0
    assert np.array_equal(frames[0] * seen, cut[:, :12] * seen)
    narrow = np.asarray(frames[2])
    assert np.array_equal(narrow[:, 3:9, 3], cut[:, 24:30, 3])
    assert not narrow[:, :3, 3].any() and not narrow[:, 9:, 3].any()


def test_numbered_frames_and_light(tmp_path):
    root = debian(tmp_path, "endless-sky")
    numbered(root / "images/effect", "ion blast+{}.png", 4)
    numbered(root / "images/asteroid/gold", "spin-{:02d}.png", 5)
    numbered(root / "images/ship", "hole-{}.png", 2)
    (root / "images/ship/hole-1.png").rename(root / "images/ship/hole-3.png")
    (root / "data").mkdir()
    (root / "data/effects.txt").write_text(
        'effect "Ion Blast"\n\tsprite "effect/ion blast"\n\t\t"frame rate" 20\n'
    )
    out = tmp_path / "sky"
    collect(kind="endless-sky", source=tmp_path, out=out)
    gold, blast = rows(out)
    assert gold["licence"] == "CC-BY-SA-3.0+" and blast["licence"] == "public-domain"
    assert "ion blast, effect of a space game" in blast["prompt"]
    assert open_rgba(out / blast["file"]).fps == pytest.approx(20)
    drawn = np.asarray(picture(0)).astype(float) / 255
    found = next(iter(open_rgba(out / blast["file"]))).astype(float) / 255
    black = drawn[..., :3] * drawn[..., 3:]
    assert np.abs(found[..., :3] * found[..., 3:] - black).max() < 1.5 / 255


def test_light_over_black_is_the_sprite():
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    for opacity in (0.0, 0.25):
        unit, found = frame / 255, with_light(frame, opacity) / 255
        seen = unit[..., :3] * unit[..., 3:]
        assert np.abs(found[..., :3] * found[..., 3:] - seen).max() < 1.5 / 255
        assert (found[..., 3] >= opacity * unit[..., 3] - 1 / 255).all()


UNIT = """[unit_type]
    id=Wolf
    name= _ "Great Wolf"
    image="units/wolves/wolf.png"
    [frame]
        image="units/wolves/wolf-attack-[1~4].png:80"
    [/frame]
"""


def test_units_take_names_and_times_from_their_descriptions(tmp_path):
    root = debian(tmp_path, "wesnoth") / "1.16/data/core"
    numbered(root / "images/units/wolves", "wolf-attack-{}.png", 4)
    numbered(root / "images/units/wolves", "wolf-defend-{}.png", 3)
    numbered(root / "images/halo", "flame-{}.png", 3)
    (root / "units").mkdir()
    (root / "units/wolf.cfg").write_text(UNIT)
    out = tmp_path / "wesnoth"
    collect(kind="wesnoth", source=tmp_path, out=out)
    flame, attack, defend = rows(out)
    assert "Great Wolf, wolf attack, units of a fantasy game" in attack["prompt"]
    assert attack["group"] == defend["group"] != flame["group"]
    assert open_rgba(out / attack["file"]).fps == pytest.approx(1000 / 80)


def test_licences_of_texts_that_no_machine_reads():
    text = "Upstream Author: Dave W <d@x.org>\n\nGNU General Public License version 2\n or at\n"
    assert terms_of(text)("anything") == ("GPL-2.0-or-later", "Dave W and others")
    assert terms_of("no word of it")("anything") == ("unknown", "unknown")


@pytest.mark.parametrize("kind", ["emoji", *DEBIAN])
def test_another_folder_is_refused_with_the_way_out(kind, tmp_path):
    (tmp_path / "package.json").write_text('{"name": "left-pad", "version": "1.0.0"}')
    (tmp_path / "photo.webp").write_bytes(b"RIFF")
    with pytest.raises(
        FileNotFoundError, match=r"(npm install --prefix|apt-get download)"
    ) as error:
        collect(kind=kind, source=tmp_path, out=tmp_path / "out")
    assert str(tmp_path) in str(error.value) and not (tmp_path / "out").exists()


def test_an_unnamed_file_is_refused(tmp_path):
    npm(tmp_path, ["holiday"])
    with pytest.raises(ValueError, match=r"holiday\.webp: its name is no row of code points"):
        collect(kind="emoji", source=tmp_path, out=tmp_path / "out")


def test_a_sprite_that_cannot_be_read_is_told(tmp_path):
    root = debian(tmp_path, "wesnoth") / "1.16/data/core/images/halo"
    numbered(root, "flame-{}.png", 3)
    numbered(root, "ring-{}.png", 3)
    (root / "ring-1.png").write_bytes(b"no picture")
    found, bad, _ = collect(kind="wesnoth", source=tmp_path, out=tmp_path / "out")
    assert [one.name for one in found] == ["wesnoth-core-halo-flame"]
    assert list(bad) == ["wesnoth-core-halo-ring"]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    root = debian(tmp_path, "wesnoth") / "1.16/data/core/images/halo"
    for name in ("flame", "ring", "wave"):
        numbered(root, name + "-{}.png", 3)
    out, whole = tmp_path / "out", tmp_path / "whole"
    collect(kind="wesnoth", source=tmp_path, out=whole)
    from data_prep import collect as module

    write, calls = module.write_animation, []

    def dies(frames, ms, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(frames, ms, path)

    monkeypatch.setattr(module, "write_animation", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(kind="wesnoth", source=tmp_path, out=out)
    assert not (out / "table.jsonl").exists()
    collect(kind="wesnoth", source=tmp_path, out=out)
    assert len(calls) == 2 + 2  # what is there is not cut again
    for path in sorted(whole.iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_another_version_is_told_and_needs_a_folder_of_its_own(tmp_path):
    npm(tmp_path, TONED)
    out = tmp_path / "out"
    *_, (note,) = collect(kind="emoji", source=tmp_path, out=out)
    known = [f"{EMOJI[0]} 1.0.0 {note.split('sha256 ')[1][:64]}"]
    assert collect(kind="emoji", source=tmp_path, out=out, known=known)[2] == []
    old = next((tmp_path / "node_modules").rglob("1f44b.webp"))
    picture(7).save(old, save_all=True, append_images=[picture(8)], lossless=True)
    with pytest.raises(ValueError, match="was made of other clips"):
        collect(kind="emoji", source=tmp_path, out=out, known=known)
    *_, (note,) = collect(kind="emoji", source=tmp_path, out=out, known=known, replace=True)
    assert "is not the one of the recipe" in note
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        collect(kind="emoji", source=tmp_path, out=tmp_path / "mine", replace=True)
