"""What runs and sweeps leave for dashboards, read back from the files of wandb, TensorBoard,
ours."""

import csv
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.wandb_agent import Agent

from acetate.callbacks.dashboards import unreachable
from tests.clones import clone
from tests.paths import ROOT
from tests.processes import alone, ended, program, train
from tests.test_resume import small
from tests.wandb_files import read, records, runs_below

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("runs")]

TINY = [
    "data.val_clips=2", "data.num_workers=0", "data.batch_size=1", "data.height=16",
    "data.width=16", "callbacks.panels.clips=1", "trainer.max_steps=2",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path, many_shards):
    more = [
        "data.num_workers=0",
        "loss.diffusion.mode=off",
        "trainer.val_check_interval=2",
        "task.decay_steps=8",
    ]
    return [*small("vae_rgba", tmp_path / "runs", many_shards, (many_shards, many_shards)), *more]


def drawn(arguments):
    """With curves.png."""
    return [text for text in arguments if text != "callbacks.curves=null"]


def run(tmp_path, *arguments, code=0, **environment):
    """The run's folder, once it has ended."""
    (found,) = ended(train(tmp_path / "log", *arguments, environment=environment), within=300)
    said = (tmp_path / "log").read_text()
    assert found == code, said[-3000:]
    (folder,) = (tmp_path / "runs").glob("*/*/")
    return folder, said


def test_the_jobs_of_a_sweep_are_runs_of_their_own(tmp_path, many_shards):
    """As the README says, in a fresh clone: four folders, four runs of wandb in one group, told
    apart by what they were given; another sweep whose first job fails."""
    here = clone(tmp_path / "clone")
    base = [
        "-m",
        "experiment=vae_rgba",
        f"data.shards={many_shards}",
        f"wan.transformer={many_shards.parent / 'base'}",
        "logger=wandb",
        *TINY,
    ]
    code, said = program(tmp_path / "log", "train.py", *base, "sweep=diffusion_mode", folder=here)
    assert code == 0, said[-3000:]
    (sweep,) = here.glob("outputs/vae_rgba/sweep_*")
    folders = sorted(sweep.glob("[0-9]"))
    modes = ["off", "opaque", "bidirectional", "upstream"]
    runs = runs_below(sweep)
    assert len(folders) == len(runs) == 4
    assert [one.id for one in runs] == [f"vae_rgba-{sweep.name}-{job}" for job in range(4)]
    assert {one.group for one in runs} == {sweep.name}
    assert {one.job_type for one in runs} == {"train"}
    assert all(one.tags == ["vae_rgba", "diffusion_mode", "vae"] for one in runs)
    assert [one.exit_code for one in runs] == [0] * 4
    for folder, one, mode in zip(folders, runs, modes, strict=True):
        assert f"loss.diffusion.mode={mode}" in one.name.replace("'", "")
        assert one.config["loss"]["diffusion"]["mode"] == mode
        assert one.config["run"]["folder"] == str(folder)
        assert one.config["run"]["commit"]
        assert {row["trainer/global_step"] for row in one.history if "val/loss" in row} <= {1, 2}
        assert (folder / "metrics.csv").exists() and (folder / "curves.png").exists()
    failing = [
        "task.lr=1e30,1e-3",
        "task.warmup_steps=0",
        f"hydra.sweep.dir={tmp_path / 'failing'}",
        "callbacks.curves=null",
    ]
    code, _ = program(tmp_path / "failing.log", "train.py", *base, *failing, folder=here)
    assert code != 0
    first, second = runs_below(tmp_path / "failing")
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert (
        "task.lr=1e+30" in first.name and "task.lr=0.001" in second.name and first.id != second.id
    )
    assert not any("val/loss" in row for row in first.history)


@pytest.mark.parametrize(
    ("logger", "there"),
    [
        ("logger=[wandb,tensorboard]", {"wandb", "tensorboard"}), ("logger=[csv,wandb]", {"wandb"}),
        ("logger=[]", set()),
    ],
)  # fmt: skip
def test_several_loggers_at_once(tmp_path, tiny, logger, there):
    """metrics.csv with any of them; each has the settings, without the secrets among them."""
    secrets = [
        "+data.remote.storage_options.s3.secret=HUSH1",
        "+data.remote.storage_options.http.headers.auth=HUSH2",
    ]  # fmt: skip
    folder, said = run(tmp_path, *tiny, logger, "trainer.max_steps=2", *secrets)
    assert {place.name for place in folder.iterdir()} & {"wandb", "tensorboard"} == there
    with (folder / "metrics.csv").open() as file:
        assert any(row["train/loss"] for row in csv.DictReader(file))
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert found["parameters"]["total"] > found["parameters"]["trainable"] > 0
    assert found["task"]["decay_steps"] == 8 and found["run"]["folder"] == str(folder)
    assert found["data"]["remote"]["storage_options"]["s3"]["secret"] == "***"
    written = [path for path in folder.rglob("*") if path.is_file() and ".hydra" not in path.parts]
    assert not [path for path in written if b"HUSH" in path.read_bytes()]
    if "wandb" in there:
        (one,) = runs_below(folder)
        assert (
            one.config["parameters"] == found["parameters"]
            and one.config["run"]["versions"]["torch"]
        )
        assert one.exit_code == 0
    if "tensorboard" in there:
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert (
            "train/loss" in events.Tags()["scalars"] and "hp_metric" not in events.Tags()["scalars"]
        )
        assert "config/text_summary" in events.Tags()["tensors"]
        assert "_hparams_/experiment" in events.summary_metadata
    for name in ("litlogger", "Tip:", "GPU available", "gcsfs", "FLOPs", "Seed set"):
        assert name not in said


def test_a_sweep_of_wandb_runs_as_it_is(tmp_path, tiny, monkeypatch):
    """wandb's own agent starts what docs/sweep.yaml says, with values as its server would send."""
    shipped = yaml.safe_load((ROOT / "docs/sweep.yaml").read_text())
    values = {
        name: {"value": next(iter(one.get("values", [one.get("min")])))}
        for name, one in shipped["parameters"].items()
    }
    environment = {
        "WANDB_SWEEP_ID": "abcd1234", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": "",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # the agent adds its own, which end with the test
    (tmp_path / "wandb").mkdir()
    agent = Agent(None, None, "abcd1234")
    short = [*tiny, "trainer.max_steps=2"]
    rest = [text for text in short if text.partition("=")[0] not in ("experiment", *values)]
    agent._sweep_command = [*shipped["command"], *rest]
    run = {"type": "run", "run_id": "ofagent1", "program": shipped["program"], "args": values}
    answer = agent._process_command(run)
    assert "exception" not in answer, answer
    assert agent._run_processes["ofagent1"].wait() == 0
    (one,) = runs_below(tmp_path / "runs")
    assert one.id == "ofagent1" and one.exit_code == 0
    assert one.config["task"]["moment_weight"] == 0.0 and one.config["task"]["lr"] == 5e-4
    assert one.config["loss"]["diffusion"]["mode"] == "off"
    assert "task.lr=0.0005" in one.name and "max_steps" not in one.name
    assert any(shipped["metric"]["name"] in row for row in one.history)


def test_artifacts_on_request(tmp_path, tiny):
    folder, _ = run(
        tmp_path, *drawn(tiny), "logger=wandb", "trainer.max_steps=2", "logger.wandb.artifacts=true"
    )
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    kept = {
        record.request.log_artifact.artifact.type or record.artifact.type: {
            entry.path
            for of in (record.request.log_artifact.artifact, record.artifact)
            for entry in of.manifest.contents
        }
        for record in records(file)
        if record.WhichOneof("record_type") == "artifact"
        or record.request.WhichOneof("request_type") == "log_artifact"
    }
    assert kept.keys() == {"adapters", "pages"}
    assert {"last.safetensors", "best.safetensors", "best.json"} <= kept["adapters"]
    pages = {name for name in ("clips.html", "curves.png") if (folder / name).exists()}
    assert pages and kept["pages"] == pages


def test_a_run_that_goes_on_keeps_its_best_in_the_summary(tmp_path, tiny):
    """Of wandb, offline: a second process, which ruins the model, knows what the first measured."""
    folder, _ = run(tmp_path, *tiny, "logger=wandb", "trainer.max_steps=4")
    more = ["trainer.max_steps=8", "resume=last", "task.lr=0.5", "task.decay_steps=null"]
    run(tmp_path, *tiny, "logger=wandb", *more)
    first, second = runs_below(folder)
    assert first.id == second.id and (first.exit_code, second.exit_code) == (0, 0)
    both = [row for one in (first, second) for row in one.history]
    for name, kind in (("val/loss", min), ("val/alpha/mae", min), ("val/rgb/psnr", max)):
        values = [row[name] for row in both if name in row]
        assert second.summary[name][kind.__name__] == pytest.approx(kind(values))
        assert second.summary[name]["last"] == pytest.approx(values[-1])
        assert getattr(second.metrics[name].summary, kind.__name__)
    stepped = [name for name in second.metrics if name != "trainer/global_step"]
    assert stepped and all(
        second.metrics[name].step_metric == "trainer/global_step" for name in stepped
    )


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        time.sleep(self.server.wait)
        self.send_response(self.server.status)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        """Not on the console of the test."""


@contextmanager
def serving(server):
    """The address of a server that does this; `half` knows no runs."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    web.daemon_threads = True
    web.status, web.wait = int(server) if server.isdigit() else 200, 600 if server == "hangs" else 0
    threading.Thread(target=web.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{web.server_port}"
    if server == "refuses":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
    if server == "unknown":
        url = "http://nowhere.invalid"
    yield {"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40}
    web.shutdown()


def why_not(environment):
    os.environ.update(environment)
    return unreachable()


@pytest.mark.parametrize(
    ("server", "said_of_it"),
    [
        ("refuses", "Connection refused"), ("hangs", "has not answered in 8 s"),
        ("401", "does not take the key"), ("500", "answers with status 500"),
        ("unknown", "cannot be reached"),
    ],
)  # fmt: skip
def test_a_server_that_takes_no_run_is_known_within_seconds(server, said_of_it):
    with serving(server) as environment:
        assert said_of_it in alone(why_not, environment, within=60)


@pytest.mark.parametrize(
    ("server", "said_of_it"), [("refuses", "Connection refused"), ("half", "wandb: ")]
)
def test_without_its_server_wandb_stays_on_disk(tmp_path, tiny, server, said_of_it):
    """Of one that is known before, and of one that fails as the run begins: that is said, and the
    run trains and ends as ever."""
    with serving(server) as environment:
        folder, said = run(tmp_path, *tiny, "logger=wandb", "trainer.max_steps=2", **environment)
    assert said_of_it in said and "stays on disk" in said and "wandb sync" in said
    (one,) = runs_below(folder)
    assert one.exit_code == 0 and any("val/loss" in row for row in one.history)


def test_without_a_home_that_can_be_written(tmp_path, tiny):
    """Neither ~/.config nor ~/.cache: a file is in the way."""
    home = tmp_path / "home"
    home.mkdir()
    for name in (".config", ".cache", ".local"):
        (home / name).write_text("")
    short = [*drawn(tiny), "logger=wandb", "trainer.max_steps=2"]
    folder, _ = run(tmp_path, *short, HOME=str(home))
    (one,) = runs_below(folder)
    assert one.exit_code == 0 and (folder / "curves.png").exists()


def test_what_a_run_says(tmp_path, tiny):
    """Where it is, how it goes, what comes next; train.log has it once, also after it went on."""
    folder, said = run(tmp_path, *tiny, "trainer.max_steps=2")
    told = (folder / "train.log").read_text()
    for text in (said, told):
        assert str(folder) in text and "train\n" in text.replace(" parameters", "")
        assert "0 to 2" in text and "finished at step 2" in text
        assert f"acetate train resume={folder} trainer.max_steps=4" in text
        assert "acetate evaluate run=" in text and "acetate export checkpoint=" in text
        assert text.count("step 2   validation") == 1
    assert len(said.splitlines()) < 60, said
    assert "Trainer.fit" not in said  # Lightning's own words
    run(tmp_path, *tiny, "trainer.max_steps=4", "resume=last")
    told = (folder / "train.log").read_text()
    assert told.count("step 2   validation") == 1 and told.count("step 4   validation") == 1
    assert "2 to 4" in told and "val/alpha/mae" in told
    failing = ["trainer.max_steps=8", "resume=last", "task.lr=1e30", "task.decay_steps=null"]
    run(tmp_path, *drawn(tiny), *failing, code=1)
    told = (folder / "train.log").read_text()
    assert "FloatingPointError" in told and "Traceback" in told and told.count("Traceback") == 1


def test_a_reader_knows_what_wandb_writes(tmp_path):
    """A record over several blocks, and one that was cut."""
    import wandb

    run = wandb.init(
        mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(silent=True)
    )
    run.config.update({"long": "x" * 100_000})
    run.log({"a": 1})
    run.finish(exit_code=3)
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = read(path)
    assert (
        found.config["long"] == "x" * 100_000
        and found.history[0]["a"] == 1
        and found.exit_code == 3
    )
    cut = Path(tmp_path / "cut.wandb")
    cut.write_bytes(path.read_bytes()[:-10])
    assert read(cut).exit_code is None


@pytest.mark.slow
def test_a_run_without_a_dashboard_does_not_import_wandb():
    code = "import sys; sys.modules['wandb'] = None; import acetate.commands.train"
    subprocess.run([sys.executable, "-c", code], check=True)
