"""Programs: thin Hydra mains. This is where a DictConfig becomes plain arguments."""

import torch
from omegaconf import OmegaConf


def _on_gpu(gpu: str, cpu: str) -> str:
    return gpu if torch.cuda.is_available() else cpu


# ${on_gpu:A,B} in conf/: A where there is a CUDA device, else B
OmegaConf.register_new_resolver("on_gpu", _on_gpu, replace=True)
