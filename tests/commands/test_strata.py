import json
from shutil import copytree
from statistics import fmean

import pytest

from acetate.commands import strata
from acetate.data.clips import ClipDataModule
from acetate.data.shards import ShardError
from acetate.models.loading import load_vae
from acetate.steps import StepTrainer
from acetate.tasks.vae import PlainVAETask
from tests.conftest import TINY


@pytest.mark.slow
def test_each_clips_figures_add_up(many_shards, tmp_path):
    held_out = tmp_path / "held_out"  # nothing of it trains
    copytree(many_shards, held_out)
    manifest = held_out / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train"', '"val"'))
    data = ClipDataModule(
        shards=str(held_out), frames=5, height=16, width=16, batch_size=1, seed=0, num_workers=0,
        val_batch_size=1, val_clips=9, bad_clip_budget=0,
    )  # fmt: skip
    task = PlainVAETask(vae=load_vae(f"{TINY}/vae"), lpips=False)
    each = strata.ClipFigures()
    trainer = StepTrainer(
        accelerator="cpu", logger=False, callbacks=[each], enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    (seen,) = trainer.validate(task, data, verbose=False)
    clips = each.of_all_ranks()
    assert sorted(clips) == sorted(ref.key for ref in data.val_refs) and len(clips) > 3
    for name in ("rgb/psnr", "rgb/ssim", "alpha/psnr", "alpha/mae"):
        assert fmean(figures[name] for figures in clips.values()) == pytest.approx(
            seen[f"val/{name}"], rel=1e-5
        )
    with pytest.raises(ShardError, match="none of 14 clips is in split 'train'"):
        data.setup("fit")
    assert len({figures["rgb/psnr"] for figures in clips.values()}) == len(clips)


def test_intervals_by_stratum(tmp_path):
    clips = {
        f"{kind}-{n}": {"rgb/psnr": base + n, "alpha/mae": 0.1}
        for kind, base, count in (("smoke", 30.0, 4), ("hair", 20.0, 1))
        for n in range(count)
    }
    found = strata.by_stratum(clips)
    assert list(found) == ["all", "hair", "smoke"]
    mean, low, high = found["smoke"]["rgb/psnr"]
    assert mean == 31.5 and 30 <= low < mean < high <= 33
    assert found["all"]["rgb/psnr"][0] == pytest.approx((4 * 31.5 + 20) / 5)
    view = strata.table({"base": found}, clips)
    assert list(view.columns[0].cells) == ["all", "hair", "smoke"]
    assert list(view.columns[1].cells) == ["5", "1", "4"]
    strata.write(tmp_path / "strata.json", {"base": found})
    read = json.loads((tmp_path / "strata.json").read_text())
    assert read["base"]["hair"]["rgb/psnr"] == [20.0, None, None]  # one clip has no interval
