"""The command line as users write it, and errors as they read them."""

import logging
import os
import random
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from acetate.cli import PROGRAMS
from acetate.commands.program import composed, in_words, tell, to_the_letter
from acetate.commands.recorded import quoted
from acetate.console import Console
from acetate.models.merge import FeatureMerge
from acetate.settings import SettingError
from tests.paths import ROOT
from tests.processes import program

PROMPTS = [
    "a ring of fire, transparent background", "a cat's tail", 'say "hi"', "'quoted'", "x: y", "{a}",
    "[a, b]", "a=b=c",
    "two\nlines", "\u732b \U0001f600", "-x", "--help", "${oc.env:HOME}", r"\${x}", "\\", "'", "",
    " ", "1", "#x",
    "a\\'b", "$", "100 % (sure)", "a@b!c*d~e+f", "x" * 10_000,
]  # fmt: skip


def value_of(argument):
    override = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"it": override.value()}).it


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("key", ["prompt", "negative_prompt", "callbacks.samples.negative_prompt"])
def test_a_prompt_is_taken_to_the_letter(key, prompt):
    assert value_of(to_the_letter("sample", f"{key}={prompt}")) == prompt


def test_any_text_can_be_quoted():
    draws = random.Random(0)
    for _ in range(3000):
        text = "".join(draws.choice("a'\"\\${}[](), =:\n-#?") for _ in range(draws.randint(0, 9)))
        if text != "???":  # what OmegaConf calls missing
            assert value_of(f"prompt={quoted(text)}") == text


@pytest.mark.parametrize(
    ("program", "argument", "value"),
    [
        ("train", "name=2024", "2024"),
        ("train", "name=1e3", "1e3"),
        ("train", "data.shards=/my clips (1)/a,b", "/my clips (1)/a,b"),
        ("train", "data.shards=[a,b]", ["a", "b"]),
        ("train", "data.shards={a: 1}", {"a": 1}),
        ("train", "task.decay_steps=null", None),
        ("train", "task.lr=1e-3", 1e-3),
        ("sample", "prompt=null", None),
        ("sample", "guide.centre=[0.5,0.5]", [0.5, 0.5]),
        ("ingest", "source=/a'b", "/a'b"),
        ("caption", "missing=(", "("),
        ("caption", "template=A {caption}, seen", "A {caption}, seen"),
    ],
)
def test_values_are_what_their_settings_take(program, argument, value):
    assert value_of(to_the_letter(program, argument)) == value


def test_a_sweep_stays_one():
    assert to_the_letter("train", "data.shards=a,b", many=True) == "data.shards=a,b"
    assert to_the_letter("train", "task.lr=1e-3,2e-3") == "task.lr=1e-3,2e-3"
    assert (
        to_the_letter("train", "experiment=vae_rgba,dit_dora", many=True)
        == "experiment=vae_rgba,dit_dora"
    )


def test_references_are_followed():
    assert (
        to_the_letter("train", "rgba_vae=${paths.outputs}/mine") == "rgba_vae=${paths.outputs}/mine"
    )


def said(*arguments):
    """What is said of a command line that cannot be composed."""
    with pytest.raises(HydraException) as caught:
        composed("config", arguments)
    return in_words(caught.value, "config", arguments)


def test_unknown_names_are_said_with_the_nearest():
    assert said("experiment=vae_rgbx").startswith(
        "experiment=vae_rgbx is unknown, the nearest is vae_rgba; there are"
    )
    assert (
        said("task.learning_rate=1") == "task.learning_rate is no setting here. --help lists them."
    )
    for group, near in (("reproduce", "upstream"), ("sweep", "ablation")):  # which may be null
        assert f"unknown, the nearest is {near}; there are" in said(f"{group}={near[:-1]}")
    assert "the nearest is task.lr." in said("task.lrr=1")
    assert "the nearest is experiment." in said("experimnt=vae_rgba")
    assert "the nearest is trainer.max_steps." in said("trainer.max_step=1")
    wrong_place = said("experiment=dit_dora", "trainer.context_parallel=2")
    assert "the nearest is task.context_parallel." in wrong_place


def test_a_wrong_value_is_said_with_the_default():
    error = SettingError("task.lr", "x", "task.lr=x: must be a number above 0.")
    assert in_words(error, "config", ["experiment=dit_dora", "task.lr=x"]).endswith(
        "The default is 0.003."
    )


def test_a_fault_of_the_program_shows_where(capsys):
    """What was not written for users comes with its traceback, what was comes alone."""

    def printed(call):
        with pytest.raises(Exception) as caught:
            call()
        tell(caught.value, PROGRAMS["train"], [])
        return capsys.readouterr().err

    ours = printed(lambda: FeatureMerge(4, 4, init="nothing"))
    assert "Traceback" not in ours
    assert ours.startswith("train: ")
    assert "Traceback" in printed(lambda: {}["x"])
    # of this file, which is no part of the programs
    assert "Traceback" in printed(lambda: int("x"))


def test_names_from_files_do_not_control_the_terminal(capsys):
    tell(ValueError("a.safetensors: 1 not used: merge.\x1b[2J\u202ex"), PROGRAMS["export"], [])
    assert r"merge.\x1b[2J\u202ex" in capsys.readouterr().err
    Console(sys.stderr).emit(logging.makeLogRecord({"msg": "clip \x1b[2J is bad"}))
    assert r"clip \x1b[2J is bad" in capsys.readouterr().err


def run_train(folder, *arguments, **environment):
    """`python train.py ARGUMENTS` from another folder than the clone; it says what it says at
    once."""
    env = {**os.environ, "ACETATE_ROOT": str(folder), **environment}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_wrong_setting_is_one_line_and_leaves_nothing(tmp_path):
    done = run_train(tmp_path, "experiment=vae_rgba", "task.lr=abc")
    assert done.returncode == 1
    assert done.stderr == "train: task.lr=abc: must be a number above 0. The default is 0.002.\n"
    assert not [*tmp_path.glob("outputs/*")]
    done = run_train(tmp_path, "experiment=vae_rgba", "task.lr=abc", HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == "acetate.settings.SettingError: task.lr=abc: must be a number above 0."
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("data.shards=nowhere", "nowhere does not exist"),
        ("task.optimizer=AdmW", "nearest is AdamW"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, setting, why):
    place = {"environment": {"ACETATE_ROOT": str(tmp_path)}, "folder": tmp_path}
    given = (str(ROOT / "train.py"), "experiment=vae_rgba", setting)
    code, said = program(tmp_path / "log", *given, **place, code=[ROOT / "src", ROOT])
    assert code == 1
    assert "Traceback" not in said
    assert why in said
    assert not [*tmp_path.glob("outputs/*")]
