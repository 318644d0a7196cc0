"""Loggers for wandb and TensorBoard that also get a run's settings and what it is made of."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import requests
import wandb
import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams
from wandb.sdk import wandb_setup

from acetate.callbacks.metrics_file import best_of, better, direction, measured, read_metrics
from acetate.redaction import redacted

log = logging.getLogger(__name__)

STEP = "trainer/global_step"  # of all values: optimizer steps that are done
ANSWER = 8.0  # seconds that wandb's server has to answer before anything is sent to it
START = 30.0  # seconds that it then has to open the run
ARTIFACTS = {  # type -> files of a run's folder
    "adapters": (
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
        "checkpoints/best.json",
    ),
    "pages": ("clips.html", "curves.png", "evaluation*.json"),
}
GRACE = 30.0  # seconds beyond `finish_timeout` until wandb's own process is killed


class WandbRun(WandbLogger):
    """One wandb run for each run of ours, started by its first value and ended by `finish`.

    Where the server does not answer within seconds, or does not take the key, that is said and the
    run stays on disk. The summary has the best and the last of what validations measure, over the
    whole life of a run that goes on in its folder. finish_timeout: seconds that the upload may take
    at the end; what is left stays on disk, for `wandb sync`. artifacts: a run that ends well leaves
    its adapters and its pages as artifacts, too.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        project: str,
        name: str,
        id: str,
        offline: bool,
        finish_timeout: float,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        artifacts: bool = False,
    ) -> None:
        about = {
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "tags": list(tags),
            "notes": notes,
        }
        super().__init__(
            name=name, save_dir=save_dir, id=id, offline=offline, project=project, **about
        )  # type: ignore[arg-type]
        self._wandb_init.pop("anonymous", None)  # wandb warns of it, whatever its value
        self.finish_timeout, self.artifacts = finish_timeout, artifacts
        self._defined: set[str] = set()
        self._best: dict[str, float] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment  # pyright: ignore[reportReturnType]  typed by its base class

    def _start(self) -> wandb.Run:
        if wandb.run is not None:  # of a job before, which ended without a word
            wandb.run.finish(exit_code=1)
        offline = self._offline or os.environ.get("WANDB_MODE", "online") not in ("online", "run")
        reason = None if offline else unreachable()
        if not offline and reason is None:
            try:
                return self._begin(self._init(None))
            except (
                Exception
            ) as error:  # of wandb, of its process, of the network: none of them may stop training
                reason = (
                    str(error).strip().splitlines()[0]
                    if str(error).strip()
                    else type(error).__name__
                )
                wandb.teardown()  # it holds the half of a run under the same id
        if reason is not None:
            log.warning(
                "wandb: %s. The run stays on disk; send it later with\n    wandb sync --id %s %s",
                reason, self._id, Path(str(self._save_dir)) / "wandb" / "offline-run-*",
            )  # fmt: skip
        return self._begin(self._init("offline" if self._offline or reason is not None else None))

    def _init(self, mode: str | None) -> wandb.Run:
        settings = wandb.Settings(
            silent=True, init_timeout=START, finish_timeout=self.finish_timeout
        )
        with _command_without_secrets():
            return wandb.init(**self._wandb_init, mode=mode, settings=settings)  # type: ignore[arg-type]

    def _begin(self, run: wandb.Run) -> wandb.Run:
        self._defined.clear()
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        for name, best in best_of(read_metrics(Path(str(self._save_dir)) / "metrics.csv")).items():
            self._define(run, name)
            self._best[name] = best.value
            run.summary.update({name: {direction(name): best.value, "last": best.last}})
        return run

    def _define(self, run: wandb.Run, name: str) -> None:
        if measured(name) and name not in self._defined:
            self._defined.add(name)
            run.define_metric(
                name, step_metric=STEP, step_sync=True, summary=f"{direction(name)},last"
            )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        run = self.experiment
        for name in metrics:
            self._define(run, name)
        super().log_metrics(metrics, step)
        # wandb knows what this process has logged, not what one before it has
        for name, value in metrics.items():
            before = self._best.get(name)
            if before is not None and not better(name, value, before):
                run.summary.update({name: {direction(name): before, "last": float(value)}})

    @property
    def where(self) -> str:
        """The address of the run's page, or how to see it."""
        run = self.experiment
        if not run.offline and run.url:
            return str(run.url)
        return f"wandb sync --id {run.id} {Path(run.dir).parents[1] / 'offline-run-*'}"

    @rank_zero_only
    def finish(self, failed: bool) -> None:
        """Ends the run, as failed or as finished, and wandb's process, in a bounded time."""
        run, self._experiment = self._experiment, None
        if run is None:
            return
        service = getattr(getattr(getattr(run, "_wl", None), "_connection", None), "_proc", None)
        process: subprocess.Popen | None = getattr(service, "_process", None)

        def end() -> None:
            if self.artifacts and not failed:
                for artifact in _artifacts(Path(str(self._save_dir)), run.id):
                    run.log_artifact(artifact)
            run.finish(exit_code=int(failed))
            wandb.teardown()

        thread = Thread(target=end, daemon=True)
        thread.start()
        thread.join(self.finish_timeout + GRACE)
        if thread.is_alive() and process is not None:
            log.warning(
                "wandb does not end; its process is killed. What it has not sent is in %s",
                self._save_dir,
            )
            process.kill()
            thread.join(GRACE)


class TensorBoardRun(TensorBoardLogger):
    """Writes to `save_dir`/tensorboard, with the settings as text and for the HPARAMS page."""

    def __init__(self, *, save_dir: str, objective: str | None = None) -> None:
        super().__init__(save_dir, name="", version="tensorboard")
        self.objective = objective

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *args: object, **settings: object) -> None:
        """Writes settings without the metric that Lightning adds at a step that has none."""
        text = yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True)
        self.experiment.add_text(
            "config", "\n".join(f"    {line}" for line in text.splitlines()), 0
        )
        writer = self.experiment._get_file_writer()
        for summary in hparams(_flat(params), {self.objective: 0} if self.objective else {}):
            writer.add_summary(summary, 0)
        self.experiment.flush()

    @property
    def where(self) -> str:
        return f"tensorboard --logdir {self.log_dir}"


def _artifacts(folder: Path, run: str) -> Iterator[wandb.Artifact]:
    """Yields what a run's folder holds of the files that artifacts carry."""
    for kind, patterns in ARTIFACTS.items():
        files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        if files:
            artifact = wandb.Artifact(f"{run}-{kind}", type=kind)
            for file in files:
                artifact.add_file(str(file), name=file.name)
            yield artifact


def unreachable() -> str | None:
    """Returns why wandb's server would not take a run with the present key; None where nothing says
    so."""
    url = str(
        wandb_setup.singleton().settings.base_url
        or os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    )
    key = os.environ.get("WANDB_API_KEY")
    try:
        answer = requests.post(
            f"{url.rstrip('/')}/graphql", json={"query": "query { viewer { id } }"}, timeout=ANSWER,
            auth=("api", key) if key else None,  # else that of ~/.netrc
        )  # fmt: skip
    except requests.Timeout:
        return f"{url} has not answered in {ANSWER:.0f} s"
    except requests.RequestException as error:
        return f"{url} cannot be reached ({_cause(error)})"
    if answer.status_code in (401, 403):
        return (
            f"{url} does not take the key (status {answer.status_code}); `wandb login --relogin` "
            "sets another"
        )
    return None if answer.ok else f"{url} answers with status {answer.status_code}"


def _cause(error: BaseException) -> str:
    """Returns what the system said, below the libraries' own words."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        reason = getattr(found.args[0], "reason", None) if found.args else None
        found = reason or found.__cause__ or found.__context__
    return type(error).__name__


@contextmanager
def _command_without_secrets() -> Iterator[None]:
    """Takes secrets out of sys.argv while wandb notes it at the start of a run."""
    kept, sys.argv = sys.argv, redacted(sys.argv)
    try:
        yield
    finally:
        sys.argv = kept


def _flat(params: Mapping[str, Any], name: str = "") -> dict[str, str | float | bool]:
    found = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}{key}.")
        else:
            found[f"{name}{key}"] = (
                value if isinstance(value, str | int | float | bool) else str(value)
            )
    return found
