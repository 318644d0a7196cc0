"""Programs: thin Hydra mains. This is where a DictConfig becomes plain arguments."""

import os
import warnings

import torch
from omegaconf import DictConfig, OmegaConf

# Said by the libraries at every start, true of every run here, and nothing a user could act on.
for message in (".*LeafSpec.*is deprecated", ".*in eval mode at the start of training", ".*does not have many workers"):
    warnings.filterwarnings("ignore", message)


def _on_gpu(gpu: str, cpu: str) -> str:
    return gpu if torch.cuda.is_available() else cpu


# ${on_gpu:A,B} in conf/: A where there is a CUDA device, else B
OmegaConf.register_new_resolver("on_gpu", _on_gpu, replace=True)
# ${not_set:NAME}: whether the environment lacks NAME
OmegaConf.register_new_resolver("not_set", lambda name: not os.environ.get(name), replace=True)


def device_of(config: DictConfig) -> str:
    """`device` of a program's settings; auto: the GPU where there is one."""
    return config.device if config.device != "auto" else _on_gpu("cuda", "cpu")
