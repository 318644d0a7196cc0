"""The command `acetate` as a user meets it: its help, its errors, a shell's completion, one's own
configs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acetate.cli import PROGRAMS, completions, conf, main
from acetate.commands.help import read
from tests.paths import ROOT
from tests.processes import program

ACETATE = Path(sys.executable).with_name("acetate")
HEAVY = ("torch", "lightning", "diffusers", "transformers", "numpy", "hydra")


def printed(capsys, *arguments):
    main(arguments)
    return capsys.readouterr().out


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys; from acetate.cli import main; main(['--help']); print('heavy', [name for "
        f"name in {HEAVY} if name in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.endswith("heavy []\n")
    for name, command in PROGRAMS.items():
        assert f"  {name:20} {command.line}\n" in said
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_a_command_has_its_settings_with_comments(name, capsys):
    text = printed(capsys, *name.split(), "--help")
    assert text.startswith(f"acetate {name} ")
    assert max(map(len, text.splitlines())) <= 100
    for path, value, comment in read(conf() / f"{PROGRAMS[name].config}.yaml").settings:
        if value and path and name != "train":
            assert f"  {path}={value}" in text
            assert comment, f"{path} has no comment"


def test_help_needs_no_torch():
    code = (
        "import sys; from acetate.cli import main; main(['sample', '--help']); print('torch' in "
        "sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.endswith("False\n")


def test_a_wrong_setting_is_told_before_torch_is_imported(tmp_path):
    code = (
        "import sys\nfrom acetate.cli import main\ntry:\n    main(['sample', 'prompt=x', "
        "'frames=6', 'dora=null'])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("sample: frames=6: must be one of 1, 5, 9")
    assert done.stdout.endswith("False\n")


def test_help_of_training_shows_the_chosen_experiment(capsys):
    text = printed(capsys, "train", "--help", "experiment=dit_dora")
    assert "task.mean_shift=1.0" in text and "Settings of experiment=dit_dora" in text
    assert "experiment=vae_rgba_wan21" in text and "  wan " in text
    assert "task.rank=7" in printed(capsys, "train", "--help", "experiment=dit_dora", "task.rank=7")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["smaple"],
            "acetate: there is no command 'smaple'; the nearest is acetate sample. acetate --help "
            "lists them.",
        ),
        (["prep", "sharb"], "the nearest is acetate prep shard"),
        (["shard"], "the nearest is acetate prep shard"),
        (["experiment=vae_rgba"], "as in acetate train experiment=vae_rgba"),
    ],
)
def test_an_unknown_command_names_the_nearest(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_setting_is_one_line_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "sede=1"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: sede is no setting here") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_text_with_a_comma_is_an_unknown_setting(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "promt=a disc, red"])
    assert "promt is no setting here, the nearest is prompt." in capsys.readouterr().err


def test_a_shell_completes_commands_settings_and_options():
    assert completions("acetate pre") == ["prep"]
    assert completions("acetate prep s") == ["shard", "synthesize"]
    assert completions("acetate sample gui") == ["guidance=", "guidance_2=", "guide="]
    assert "vae_rgba" in completions("acetate train experiment=vae")
    assert completions("acetate train exp") == ["experiment="]


LOSS = """
import torch
from torch import nn


class Charbonnier(nn.Module):
    def forward(self, x_hat, x, feature_maps):
        return ((x_hat - x).square() + 1e-6).sqrt().mean()
"""
MINE = """\
# @package _global_
# A try.
defaults: [vae_rgba, override /loss/perceptual: charbonnier]
name: mine
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_installed_command_takes_configs_and_modules_of_ones_own(tmp_path, shards):
    """Those where it is started, as the tour says; they are trained with."""

    def said(*arguments):
        env = {**os.environ, "ACETATE_ROOT": str(tmp_path)}
        command = [ACETATE, "train", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    (tmp_path / "my_losses.py").write_text(LOSS)
    for place, text in (
        ("loss/perceptual/charbonnier.yaml", "_target_: my_losses.Charbonnier\n"),
        ("experiment/mine.yaml", MINE),
    ):
        (tmp_path / "conf" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / place).write_text(text)
    help_text = said("--help").stdout
    assert "experiment=mine" in help_text and "A try." in help_text
    small = [
        "data.val_clips=1",
        "data.num_workers=0",
        "callbacks.panels.clips=1",
        "data.height=16",
        "data.width=16",
    ]
    done = said(
        "experiment=mine",
        f"data.shards={shards}",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        *small,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert next(tmp_path.glob("outputs/mine/*/metrics.csv")).exists()
    code, text = program(
        tmp_path / "log", "acetate", "train", "experiment=mine", "data.shards=none",
        environment={"ACETATE_ROOT": str(tmp_path)}, folder=tmp_path, code=[ROOT / "src", ROOT],
    )  # fmt: skip
    assert code == 1 and "none does not exist" in text


def test_train_py_is_the_same_command():
    said = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("acetate train experiment=NAME")
