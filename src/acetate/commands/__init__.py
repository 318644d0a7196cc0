"""Programs: thin Hydra mains. This is where a DictConfig becomes plain arguments."""

import os

import torch
from omegaconf import OmegaConf


def _on_gpu(gpu: str, cpu: str) -> str:
    return gpu if torch.cuda.is_available() else cpu


# ${on_gpu:A,B} in conf/: A where there is a CUDA device, else B
OmegaConf.register_new_resolver("on_gpu", _on_gpu, replace=True)
# ${not_set:NAME}: whether the environment lacks NAME
OmegaConf.register_new_resolver("not_set", lambda name: not os.environ.get(name), replace=True)
