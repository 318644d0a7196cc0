"""Programs, thin Hydra mains: here a DictConfig becomes plain arguments."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from acetate.commands import runs

# Said by the libraries at every start, true of every run here, and nothing a user could act on.
for message in (
    ".*LeafSpec.*is deprecated",
    ".*in eval mode at the start of training",
    ".*does not have many workers",
    ".*callbacks used to create the checkpoint",  # evaluate takes the average and leaves the others
    "`broadcast_buffers` is deprecated",  # as of torch 2.13, whose own name older ones do not know
    "Checkpoint directory .* exists and is not empty",  # of a run that goes on
    "It is recommended to use `self.log",  # means are sums over ranks already
):
    warnings.filterwarnings("ignore", message)


def _on_gpu(gpu: str, cpu: str) -> str:
    import torch  # seconds, which a wrong setting need not wait for

    return gpu if torch.cuda.is_available() else cpu


# ${on_gpu:A,B} in conf/: A where there is a CUDA device, else B
OmegaConf.register_new_resolver("on_gpu", _on_gpu, replace=True)


@contextmanager
def as_on_gpu(there: bool = True) -> Iterator[None]:
    """Lets configs resolve as on a machine with a GPU, or without one, wherever they are asked
    about."""
    OmegaConf.register_new_resolver("on_gpu", lambda gpu, cpu: gpu if there else cpu, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("on_gpu", _on_gpu, replace=True)


HOME = Path(__file__).parents[3]  # the clone, where there is one
SHIPPED = (
    PACKAGE if (PACKAGE := Path(__file__).parents[1]).joinpath("assets").is_dir() else HOME
)  # configs and the tiny base


def root() -> str:
    """Returns the folder of outputs and data: ACETATE_ROOT, else the clone, whatever folder a
    command is started in; an installed package, which has no clone, takes the working directory."""
    return os.environ.get("ACETATE_ROOT") or str(
        HOME if (HOME / "train.py").exists() else Path.cwd()
    )


# ${root:}, ${assets:}
OmegaConf.register_new_resolver("root", root, replace=True, use_cache=True)
OmegaConf.register_new_resolver("assets", lambda: str(SHIPPED / "assets"), replace=True)


def _no_wandb_key() -> bool:
    """Returns whether wandb's key is neither in the environment nor where `wandb login` leaves
    it."""
    if os.environ.get("WANDB_API_KEY"):
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host) is None
    except (OSError, NetrcParseError):
        return True


# ${no_wandb_key:}
OmegaConf.register_new_resolver("no_wandb_key", _no_wandb_key, replace=True)

# ${equal:A,B}
OmegaConf.register_new_resolver("equal", lambda one, other: one == other, replace=True)

# Of a run: where in its folder Hydra notes how it was started, and its name for a logger
OmegaConf.register_new_resolver("record_folder", runs.record_folder, replace=True, use_cache=True)
OmegaConf.register_new_resolver("run_id", runs.run_id, replace=True)


def launched(what: str) -> str | int:
    """Returns `devices` or `nodes` of the processes that torchrun or srun started; else all devices
    of one machine."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env:
        local, world = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"])
        return {"devices": local, "nodes": world // local}[what]
    nodes = int(env.get("SLURM_NNODES", 1))
    tasks = int(env.get("SLURM_NTASKS", nodes))
    return {"devices": tasks // nodes if tasks > nodes else "auto", "nodes": nodes}[what]


# ${launched:devices}, ${launched:nodes}: what Lightning must be told of a launcher's processes
OmegaConf.register_new_resolver("launched", launched, replace=True)


def device_of(config: DictConfig) -> str:
    """Returns `device` of a program's settings; auto is the GPU where there is one."""
    return config.device if config.device != "auto" else _on_gpu("cuda", "cpu")
