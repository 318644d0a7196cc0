import os

import pytest
import torch

from acetate.formats.training import WholeCheckpointIO


def test_round_trip(tmp_path):
    checkpoint = {"state_dict": {"w": torch.arange(3.0)}, "global_step": 7}
    WholeCheckpointIO().save_checkpoint(checkpoint, tmp_path / "new/last.ckpt")
    assert torch.load(tmp_path / "new/last.ckpt", weights_only=True)["global_step"] == 7
    assert os.listdir(tmp_path / "new") == ["last.ckpt"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, small_disk):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(
        OSError, match=r"last\.ckpt could not be written .* MiB are free there.* resume=last"
    ):
        WholeCheckpointIO().save_checkpoint({"w": torch.zeros(10**6)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_file_takes_the_place_of_a_sharded_folder(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / ".metadata").write_text("")
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"other\.ckpt cannot be read"):
        WholeCheckpointIO().load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"other\.ckpt holds a list; a checkpoint is a dict"):
        WholeCheckpointIO().load_checkpoint(path)
