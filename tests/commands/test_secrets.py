"""Passwords and tokens: nothing that a command writes or says has them, and it works with them."""

import base64
import subprocess
import sys

import pytest

from acetate.cli import PROGRAMS
from acetate.commands.program import composed, own_configs, start
from acetate.commands.secrets import TABLE, find, hide, refuse_in_jobs
from tests.processes import program
from tests.servers import serving

LOGIN, TOKEN, LITERAL = "someone:HUSH-login", "HUSH-token", "HUSH-literal"
BASIC = "Basic " + base64.b64encode(LOGIN.encode()).decode()
SMALL = [
    "experiment=vae_rgba", "data.frames=5", "data.height=16", "data.width=16", "data.batch_size=1",
    "data.num_workers=0", "data.val_clips=2", "data.remote.retries=0", "data.remote.backoff=0",
    "logger=[wandb,tensorboard]", "logger.wandb.offline=true", "trainer.val_check_interval=1",
]  # fmt: skip


def guarded(path, headers):
    """The files are for those alone who have the login and the token."""
    ours = headers.get("Authorization") == BASIC and headers.get("X-Api-Key") == TOKEN
    return None if ours else (401, {}, b"")


def leaks(folder):
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and (b"HUSH" in path.read_bytes() or "HUSH" in path.name)
    ]


@pytest.mark.long
@pytest.mark.slow
def test_a_run_writes_no_secret_and_goes_on_with_it(tmp_path, many_shards):
    said = tmp_path / "said"
    said.mkdir()
    (tmp_path / "run").mkdir()

    def train(log, *arguments):
        places = [f"paths.outputs={tmp_path}/run", f"paths.cache={tmp_path}/run/cache"]
        return program(said / log, "train.py", *arguments, *places)

    with serving(many_shards, guarded) as server:
        url = server.url.replace("://", f"://{LOGIN}@")
        secrets = [
            f"data.shards={url}",
            f"+data.remote.storage_options.http.headers.X-Api-Key={TOKEN}",
            f"+data.remote.storage_options.s3={{secret: {LITERAL}, anon: true}}",
        ]
        code, text = train("first", *SMALL, *secrets, "trainer.max_steps=1")
        assert code == 0, text[-3000:]
        last = f"resume={tmp_path}/run/vae_rgba"
        code, text = train("without", last, "trainer.max_steps=2")
        assert code == 1 and "data.shards has a secret" in text and "Give data.shards=..." in text
        assert "ACETATE_DATA_SHARDS" in text and "Traceback" not in text
        code, text = train("again", last, *secrets, "trainer.max_steps=2")
        assert code == 0, text[-3000:]
        plain = [text for text in SMALL if not text.startswith("logger")]
        sweep = ["-m", *plain, *secrets, "trainer.max_steps=1", "seed=1,2"]
        code, text = train("sweep", *sweep, "name=swept")
        assert code == 0, text[-3000:]
    code, text = train("gone", *SMALL, *secrets, "name=gone", "trainer.max_steps=1")
    assert code == 1 and "could not be fetched" in text
    assert list(tmp_path.glob("run/swept/sweep_*/multirun.yaml"))
    assert not leaks(tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_a_failed_fetch_says_no_secret(tmp_path, many_shards):
    def broken(path, headers):
        return (500, {}, b"") if ".tar" in path else None

    with serving(many_shards, broken) as server:
        url = server.url.replace("://", f"://{LOGIN}@")
        code, text = program(
            tmp_path / "log", "train.py", *SMALL, f"data.shards={url}?sig=HUSH-signature",
            f"paths.outputs={tmp_path}/run", f"paths.cache={tmp_path}/cache",
            "trainer.max_steps=1", "data.bad_clip_budget=0",
        )  # fmt: skip
    assert code == 1 and "500" in text and list(tmp_path.rglob("*.failed"))
    assert all("sig=HUSH-signature" in path for path, _ in server.asked)
    assert not leaks(tmp_path)


@pytest.mark.parametrize(
    ("argument", "hidden"),
    [
        ("data.shards=https://me:HUSH@host/a", "data.shards=https://***data.shards***@host/a"),
        (
            "data.shards=[https://me:HUSH@host/a,https://it:HUSH@host/b]",
            "data.shards=[https://***data.shards***@host/a,https://***data.shards.2***@host/b]",
        ),
        (
            r"data.shards={https\://me\:HUSH@host/a: 1}",
            r"data.shards={https\://***data.shards***@host/a: 1}",
        ),
        ("data.shards=https://host/a?sig=HUSH", "data.shards=https://host/a?sig=***data.shards***"),
        ("+hub_token=HUSH", "+hub_token='***hub_token***'"),
        (
            "+data.remote={storage_options: {s3: {secret: HUSH, anon: true}}}",
            "+data.remote={storage_options:{s3:{secret:"
            "'***data.remote.storage_options.s3.secret***',anon:true}}}",
        ),
        ("prompt=a key to the garden", "prompt=a key to the garden"),
        ("+hub_token=${oc.env:HUB}", "+hub_token=${oc.env:HUB}"),
        (
            "+r.storage_options.s3.endpoint_url=https://h",
            "+r.storage_options.s3.endpoint_url=https://h",
        ),
    ],
)
def test_arguments_hide_their_secrets(monkeypatch, argument, hidden):
    monkeypatch.setenv(TABLE, "{}")
    assert hide([argument]) == [hidden] == hide([hidden])


def test_a_secret_of_a_record_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(TABLE, "{}")
    with pytest.raises(ValueError, match=r"Give \+?a\.key=\.\.\. again, or set ACETATE_A_KEY"):
        find(["a.key='***a.key***'"])
    monkeypatch.setenv("ACETATE_A_KEY", "HUSH")
    find(["a.key='***a.key***'"])


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_secret_in_a_yaml_file_reaches_no_job(tmp_path, monkeypatch, capsys, launcher):
    """Submitit's jobs read the whole config from a file."""
    own = tmp_path / "conf/experiment/mine.yaml"
    own.parent.mkdir(parents=True)
    text = "# @package _global_\ndefaults: [vae_rgba]\nhub_token: {}\n"
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "experiment=mine", f"hydra/launcher={launcher}", "seed=1,2"]
    own.write_text(text.format("HUSH"))
    with pytest.raises(SystemExit):
        start(PROGRAMS["train"], arguments)
    said = capsys.readouterr().err
    assert "hub_token: a secret in a YAML file" in said and "${oc.env:ACETATE_HUB_TOKEN}" in said
    assert "HUSH" not in said and not list(tmp_path.glob("outputs/**/*.pkl"))
    own.write_text(text.format("${oc.env:HUB_TOKEN}"))
    own_configs()
    shown = composed("config", ["experiment=mine", f"hydra/launcher={launcher}"], hydra=True)
    refuse_in_jobs(shown)


def test_the_config_is_shown_without_secrets(tmp_path):
    own = tmp_path / "conf/experiment/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults: [vae_rgba]\nhub_token: HUSH\n")
    done = subprocess.run(
        [sys.executable, "-m", "acetate", "train", "experiment=mine", "--cfg", "job"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "hub_token: '***'" in done.stdout, done.stderr
    assert "HUSH" not in done.stdout + done.stderr
