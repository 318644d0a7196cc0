import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from acetate.cli import PROGRAMS
from acetate.commands.program import command_line
from acetate.commands.recorded import recorded_overrides, run_of, run_to_continue, with_recorded
from acetate.commands.runs import (
    FINISHED,
    LOCK,
    checkpoint_to_resume,
    only_writer,
    record_folder,
    run_folder,
    run_id,
    sweep_folder,
)

WRITER = """
import sys
from pathlib import Path
from acetate.commands.runs import only_writer
with only_writer(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""
THESE = ["experiment=vae_rgba", "task.lr=1"]


def make(folder, age=0, overrides=THESE):
    """A run that has a checkpoint, `age` seconds old."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra/overrides.yaml")
    (folder / ".hydra/config.yaml").touch()
    last = folder / "checkpoints/last.ckpt"
    last.touch()
    os.utime(last, (10**9 - age, 10**9 - age))
    return folder


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


def choose(outputs, resume, overrides=THESE):
    return run_folder(str(outputs), "demo", resume, overrides, "NOW")


def test_last_is_the_newest_that_has_a_checkpoint(tmp_path):
    assert choose(tmp_path, "last") == str(tmp_path / "demo/NOW")
    assert not (tmp_path / "demo").exists()
    make(tmp_path / "demo/b", age=9)
    newest = make(tmp_path / "demo/a", overrides=["other=1"])
    (tmp_path / "demo/c").mkdir()
    make(tmp_path / "other/d")
    assert choose(tmp_path, "last") == str(newest)
    assert choose(tmp_path, None) == str(tmp_path / "demo/NOW")


def test_runs_of_one_second_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        chosen = list(threads.map(lambda _: choose(tmp_path, None), range(8)))
    assert sorted(chosen) == sorted(str(path) for path in (tmp_path / "demo").iterdir())
    assert len(set(chosen)) == 8


def test_a_sweep_goes_on_in_its_folder(tmp_path):
    sweep = functools.partial(
        sweep_folder, str(tmp_path), "demo", overrides=[*THESE, "resume=auto"], now="NOW"
    )
    first = sweep(None)
    assert first == str(tmp_path / "demo/sweep_NOW")
    assert sweep(None) == f"{first}_2"
    OmegaConf.save(
        {"hydra": {"overrides": {"task": THESE}}}, tmp_path / "demo/sweep_NOW/multirun.yaml"
    )
    assert sweep("auto") == sweep("last") == first
    other = sweep_folder(str(tmp_path), "demo", "auto", ["task.lr=2"], "NOW")
    assert other == f"{first}_3"


def test_a_run_knows_its_settings(tmp_path, monkeypatch):
    """Those of its last start, from whatever folder it goes on, the command's own on top."""
    run = make(
        tmp_path / "demo/a",
        overrides=["experiment=vae_rgba", "data.shards=told", "init=x", "task.lr=1"],
    )
    (tmp_path / "told").mkdir()
    OmegaConf.save({"hydra": {"runtime": {"cwd": str(tmp_path)}}}, run / ".hydra/hydra.yaml")
    told = f"data.shards={tmp_path / 'told'}"
    assert recorded_overrides(run) == ["experiment=vae_rgba", told, "task.lr=1"]
    own = ["resume=last", "++task.lr=2"]
    assert with_recorded(run, own) == ["experiment=vae_rgba", told, *own]
    monkeypatch.chdir(tmp_path)
    assert "data.shards=told" in recorded_overrides(run)
    later = run / ".hydra/2026-01-31_10-00-00"
    later.mkdir()
    OmegaConf.save(
        ["experiment=vae_rgba", "trainer.max_steps=9", "resume=last"], later / "overrides.yaml"
    )
    assert recorded_overrides(run) == ["experiment=vae_rgba", "trainer.max_steps=9"]


@pytest.mark.parametrize("resume", ["last", "RUN", "CKPT"])
def test_settings_of_the_resumed_recipe_are_known(resume, tmp_path):
    """Not only those of the recipe that a command without experiment= would train."""
    run = make(tmp_path / "dit/a", overrides=["experiment=dit_dora", "name=dit"])
    source = {"last": "last", "RUN": str(run), "CKPT": f"{run}/checkpoints/last.ckpt"}[resume]
    given = [f"paths.outputs={tmp_path}", f"resume={source}", "callbacks.samples.solver.steps=2"]
    given += ["name=dit"] if resume == "last" else []
    line = command_line(PROGRAMS["train"], given)
    assert {"experiment=dit_dora", given[2]} <= set(line)
    folder = Path(line[-1].partition("=")[2].strip("'"))
    assert folder.parent == run.parent and (folder == run) == (resume != "CKPT")


def test_another_kind_of_data_is_said_loudly(tmp_path, capsys):
    run = make(tmp_path / "demo/a", overrides=["data.shards=told"])
    with_recorded(run, ["data.shards=other", "resume=last"])
    assert "ATTENTION: data.shards is now other, the run so far has told" in capsys.readouterr().err
    with_recorded(run, ["data.shards=told", "trainer.max_steps=9", "resume=last"])
    assert "ATTENTION" not in capsys.readouterr().err


def test_the_run_that_a_path_belongs_to(tmp_path):
    run, older = make(tmp_path / "demo/b"), make(tmp_path / "demo/a", age=9)
    for path in (run, run / "checkpoints/last.ckpt", tmp_path / "demo"):
        assert run_of(str(path)) == run
    assert run_of(str(older)) == run_to_continue(str(tmp_path), "demo", str(older)) == older
    assert run_to_continue(str(tmp_path), "demo", "last") == run
    assert (
        run_to_continue(str(tmp_path), "demo", "auto")
        is run_to_continue(str(tmp_path), "demo", None)
        is None
    )
    assert run_of(str(tmp_path / "gone")) is None


def test_auto_goes_on_with_an_unfinished_run_of_the_same_command(tmp_path):
    same = make(tmp_path / "demo/a", age=9)
    make(tmp_path / "demo/b", overrides=["experiment=vae_rgba", "task.lr=2"])
    assert choose(tmp_path, "auto", ["task.lr=1", "resume=auto", "experiment=vae_rgba"]) == str(
        same
    )
    assert choose(tmp_path, "auto", ["task.lr=3"]) == str(tmp_path / "demo/NOW")
    (same / FINISHED).touch()
    assert choose(tmp_path, "auto") == str(tmp_path / "demo/NOW_2")


def test_checkpoint_to_resume(tmp_path):
    run = make(tmp_path / "demo/a")
    last = str(run / "checkpoints/last.ckpt")
    assert checkpoint_to_resume("last", run) == checkpoint_to_resume("auto", run) == last
    assert checkpoint_to_resume(last, tmp_path) == last
    assert (
        checkpoint_to_resume(None, run)
        is checkpoint_to_resume("auto", tmp_path / "demo/new")
        is None
    )
    with pytest.raises(FileNotFoundError, match=r"no last\.ckpt below .*demo\. Leave out resume"):
        checkpoint_to_resume("last", tmp_path / "demo/new")
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt does not exist"):
        checkpoint_to_resume(str(tmp_path / "gone.ckpt"), run)
    shards = tmp_path / "shards.ckpt"
    shards.mkdir()
    adapters = run / "checkpoints/last.safetensors"
    adapters.touch()
    assert checkpoint_to_resume(str(tmp_path / "demo"), tmp_path) == last
    for wrong in ("", shards, run / "checkpoints", adapters):
        with pytest.raises(ValueError, match=f"resume={wrong} is no checkpoint of training"):
            checkpoint_to_resume(str(wrong), run)
    (shards / ".metadata").touch()
    assert checkpoint_to_resume(str(shards), tmp_path) == str(shards)
    assert checkpoint_to_resume(str(run), tmp_path) == last


def test_a_checkpoint_that_stepped_aside_is_found(tmp_path):
    run = make(tmp_path / "demo/a")
    last, aside = run / "checkpoints/last.ckpt", run / "checkpoints/.old-last.ckpt"
    last.rename(aside)
    for resume in ("last", "auto"):
        assert choose(tmp_path, resume) == str(run)
        assert checkpoint_to_resume(resume, run) == str(aside)
    assert checkpoint_to_resume(str(last), tmp_path) == str(aside)


@pytest.fixture
def writer(tmp_path):
    """Another process, which writes to the run's folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"in\n"
    yield process
    process.kill()
    process.wait()


def test_a_run_has_one_writer(tmp_path, writer):
    (tmp_path / FINISHED).touch()
    with (
        pytest.raises(RuntimeError, match=f"by process {writer.pid} on .*resume=last"),
        only_writer(tmp_path),
    ):
        pass
    assert (tmp_path / FINISHED).exists()
    writer.kill()
    writer.wait()
    with only_writer(tmp_path):
        assert not (tmp_path / FINISHED).exists()
    assert (tmp_path / FINISHED).exists()


def test_a_writer_on_another_machine_has_time_to_end(tmp_path, writer, caplog):
    (tmp_path / LOCK).write_text("7 on elsewhere")
    with (
        pytest.raises(RuntimeError, match="by process 7 on elsewhere"),
        only_writer(tmp_path, patience=0),
    ):
        pass
    ends = threading.Timer(0.3, writer.kill)
    ends.start()
    with only_writer(tmp_path, patience=600):
        assert "written by process 7 on elsewhere; waiting for it, 600 s at most" in caplog.text
    ends.join()


def test_first_notes_are_kept_and_one_rank_writes_them(tmp_path, monkeypatch):
    run = make(tmp_path / "demo/a")
    assert record_folder(str(run), "NOW") == ".hydra/NOW"
    assert record_folder(str(tmp_path / "demo/new"), "NOW") == ".hydra"
    monkeypatch.setenv("RANK", "1")
    assert record_folder(str(run), "NOW") is None


def test_a_run_keeps_its_id(tmp_path):
    assert (
        run_id(str(tmp_path), str(tmp_path / "demo/2026-01-31_10-00-00"))
        == "demo-2026-01-31_10-00-00"
    )
    assert run_id(str(tmp_path), str(tmp_path / "demo/sweep_1/3")) == "demo-sweep_1-3"
    assert run_id(str(tmp_path), "/elsewhere/sweep/0") == "sweep-0"


def test_ranks_of_srun_name_the_folder_after_the_job(tmp_path, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose(tmp_path, None) == str(tmp_path / "demo/slurm_7_0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert choose(tmp_path, "auto") == str(tmp_path / "demo/slurm_7_0_2")
    first = make(tmp_path / "demo/slurm_7_0")
    assert choose(tmp_path, "auto") == str(first)


@pytest.mark.slow
@pytest.mark.long
def test_ranks_of_torchrun_hear_of_rank_zeros_choice(tmp_path):
    """Two processes with clocks that differ, and the store that torchrun's agent serves."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {}

    def rank(number):
        environment = {
            "RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        call = f"run_folder('{tmp_path}', 'demo', None, [], 'at_{number}')"
        code = f"from acetate.commands.runs import run_folder; print({call})"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True
        )
        said[number] = done.stdout.decode().strip() or done.stderr.decode()

    ranks = [threading.Thread(target=rank, args=(number,)) for number in (1, 0)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert said == dict.fromkeys((0, 1), str(tmp_path / "demo/at_0"))
