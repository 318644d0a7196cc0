"""Every kind of checkpoint that a run writes, read back; the sharded one is written by two
ranks."""

import json
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.data import DataLoader

from acetate.callbacks.checkpoints import AdapterCheckpoint
from acetate.callbacks.ema import EMA
from acetate.formats.checkpoints import read_trained
from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
from acetate.models.dit import add_dora, velocity
from acetate.steps import StepTrainer
from acetate.tasks.adapter import AdapterTask
from tests.hostile import Hostile
from tests.processes import launch

CHANNELS, WIDTH = 4, 24
FACTS = {"schema": ADAPTER_SCHEMA, "kind": "dit_dora", "base": "tiny", "transformer_sha256": "0",
    "rank": 3, "alpha": 6,
         "mean_shift": 1.0}  # fmt: skip


class DoRA(AdapterTask):
    """A tiny DiT with DoRA, sharded where there is a device mesh."""

    def __init__(self):
        super().__init__(
            lr=0.1, warmup_steps=0, decay_steps=None, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.transformer: WanTransformer3DModel | None = None

    def configure_model(self) -> None:
        if self.transformer is not None:
            return
        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=WIDTH // 2, in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=8, freq_dim=8, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
        )  # fmt: skip
        add_dora(self.transformer, FACTS["rank"], FACTS["alpha"])
        if self.device_mesh is not None:
            for block in self.transformer.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.transformer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        context = torch.ones(len(batch), 3, 8)
        return (
            velocity(self.transformer, batch, torch.full((len(batch),), 500.0), context)
            .square()
            .mean()
        )

    def adapter_metadata(self):
        return {name: json.dumps(value) for name, value in FACTS.items()}


def fit(folder, *callbacks, **settings):
    task = DoRA()
    trainer = StepTrainer(
        accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, AdapterCheckpoint) for callback in callbacks),
        default_root_dir=folder, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(task, DataLoader(torch.randn(12, CHANNELS, 1, 4, 4), batch_size=2))
    return trainer, task


def trained(task):
    return {name: p.detach() for name, p in trainable_state(task.transformer).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with EMA, its task and the average."""
    folder, ema = tmp_path_factory.mktemp("run"), EMA(0.5)
    keep = AdapterCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_train_steps=3)
    _, task = fit(folder, ema, keep)
    return (
        folder,
        task,
        {name.removeprefix("transformer."): value for name, value in ema.average.items()},
    )


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_a_folder_means_its_newest_checkpoint(run):
    folder, task, average = run
    whole = folder / "checkpoints/last.ckpt"
    for source in (folder, folder.parent / folder.name / ".", whole):
        found = read_trained(str(source))
        assert (found.path, found.kind) == (whole, "dit_dora")
        assert_same(found.state, average)
        assert (found.facts["rank"], found.facts["step"], found.facts["averaged"]) == (3, 3, True)
    assert_same(read_trained(str(folder), ema=True).state, average)
    raw = read_trained(str(folder), ema=False)
    assert_same(raw.state, trained(task))
    assert not raw.facts["averaged"]


def test_adapter_file(run, tmp_path):
    folder, _, average = run
    file = folder / "checkpoints/last.safetensors"
    found = read_trained(str(file))
    assert_same(found.state, average)
    assert found.facts["averaged"]
    with pytest.raises(
        ValueError, match=r"last\.safetensors holds the average; ema=false needs the \.ckpt"
    ):
        read_trained(str(file), ema=False)
    alone = tmp_path / "checkpoints/last.safetensors"  # where the .ckpt was not kept
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    assert read_trained(str(tmp_path)).path == alone


def test_no_average(tmp_path):
    trainer, task = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    assert_same(read_trained(str(tmp_path / "raw.ckpt")).state, trained(task))
    with pytest.raises(ValueError, match=r"raw\.ckpt holds no average: its run had no EMA"):
        read_trained(str(tmp_path / "raw.ckpt"), ema=True)


def test_bad_files_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no checkpoint there\. Give a \.ckpt"):
        read_trained(str(tmp_path / "nowhere"))
    whole = (run[0] / "checkpoints/last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:-500])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read \("):
        read_trained(str(tmp_path / "cut.ckpt"))
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "old.ckpt")
    with pytest.raises(
        ValueError, match=r"old\.ckpt does not say what model it belongs to.*\.safetensors beside"
    ):
        read_trained(str(tmp_path / "old.ckpt"))
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt holds a list"):
        read_trained(str(tmp_path / "list.ckpt"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"kind": '"lora"'})
    with pytest.raises(
        ValueError,
        match=r"other\.safetensors is of kind 'lora', schema None; needed: rgba_vae or dit",
    ):
        read_trained(str(tmp_path / "other.safetensors"))
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt cannot be read"):
        read_trained(str(tmp_path / "bad.ckpt"))
    assert not (tmp_path / "ran").exists()


def damaged(run, tmp_path, change):
    checkpoint = torch.load(run[0] / "checkpoints/last.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    return str(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("global_step"), "has no global_step"),
        (lambda held: held["adapter_metadata"].pop("rank"), "its metadata has no rank"),
        (lambda held: held["adapter_metadata"].update(alpha="null"), "its metadata has alpha=None"),
        (
            lambda held: held["adapter_metadata"].update(rank="{"),
            "adapter_metadata are not names and JSON",
        ),
        (
            lambda held: held.update(adapter_metadata=None),
            "adapter_metadata are not names and JSON",
        ),
        (lambda held: held.pop("state_dict"), "has no state_dict"),
        (lambda held: held["state_dict"].update(lr=0.1), "holds lr: no tensor"),
        (
            lambda held: held["state_dict"].clear(),
            r"no whole dit_dora: 30 missing: blocks\.0\.attn1\.to_q\.lora_A",
        ),
    ],
)
def test_damaged_checkpoints(run, tmp_path, change, message):
    source = damaged(run, tmp_path, change)
    with pytest.raises(ValueError, match=rf"bad\.ckpt.*{message}"):
        read_trained(source, ema=False)


def test_bad_pickles_give_no_advice_to_run_them(tmp_path):
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "bad.ckpt")
    (tmp_path / "text.ckpt").write_text("nothing")
    for name in ("bad.ckpt", "text.ckpt"):
        with pytest.raises(ValueError, match=name) as error:
            read_trained(str(tmp_path / name))
        assert "weights_only" not in str(error.value)


def sharded(folder, state, change=None):
    """A sharded checkpoint of one process; change: of its index."""
    dcp.save({"state_dict": state}, checkpoint_id=folder, no_dist=True)
    facts = {name: json.dumps(value) for name, value in FACTS.items()}
    torch.save({"adapter_metadata": facts, "global_step": 1, "callbacks": {}}, folder / "meta.pt")
    if change is not None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        index = change(index) or index
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    return str(folder)


def shortened(index):
    entry = index.state_dict_metadata["state_dict.a"]
    entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 3)))]


def without_a_table(index):
    index.state_dict_metadata = None


def without_a_type(index):
    index.state_dict_metadata["state_dict.a"].properties = None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a", shortened, r"no shards for all of state_dict\.a"),
        ("a", without_a_table, "cannot be read as a sharded checkpoint"),
        ("a", without_a_type, "cannot be read as a sharded checkpoint"),
        ("a", None, r"no whole dit_dora: .*1 not used: a\. "),
    ],
)
def test_index_of_wrong_content(tmp_path, name, change, message):
    source = sharded(tmp_path, {name: torch.ones(4, 3)}, change)
    with pytest.raises(ValueError, match=message):
        read_trained(source)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_checkpoint_without_tensors(tmp_path):
    with pytest.raises(ValueError, match="names no tensor of a state_dict"):
        read_trained(sharded(tmp_path, {}))


@pytest.mark.parametrize("index", ["code", "cut", "number"])
def test_bad_index_of_a_sharded_checkpoint(tmp_path, index):
    (tmp_path / "meta.pt").touch()
    content = {
        "code": pickle.dumps(Hostile(tmp_path / "ran")),
        "cut": b"\x80\x04",
        "number": pickle.dumps(7),
    }[index]
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a sharded checkpoint"):
        read_trained(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def train_sharded(out):
    """On the ranks of one process group; the first writes what trained, and its average, whole."""
    ema = EMA(0.5)
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=True,
        process_group_backend="gloo",
    )
    keep = AdapterCheckpoint(dirpath=out / "checkpoints", save_last=True, every_n_train_steps=3)
    trainer, task = fit(out, ema, keep, devices=2, strategy=strategy)
    expected = {
        "raw": {name: value.full_tensor() for name, value in trained(task).items()},
        "average": {
            name.removeprefix("transformer."): v.full_tensor() for name, v in ema.average.items()
        },
    }
    if trainer.is_global_zero:
        torch.save(expected, out / "expected.pt")


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_sharded_checkpoint_is_read_whole(tmp_path):
    launch(2, train_sharded, tmp_path)
    folder, expected = (
        tmp_path / "checkpoints/last.ckpt",
        torch.load(tmp_path / "expected.pt", weights_only=True),
    )
    assert len(list(folder.glob("*.distcp"))) == 2
    raw, average = (read_trained(str(tmp_path), ema=ema) for ema in (False, True))
    assert raw.path == folder
    assert_same(raw.state, expected["raw"])
    assert_same(average.state, expected["average"])
    assert_same(read_trained(str(folder.with_suffix(".safetensors"))).state, expected["average"])
    assert read_trained(str(folder)).facts == {**FACTS, "step": 3, "averaged": True}
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read as a sharded checkpoint"):
        read_trained(str(folder))
