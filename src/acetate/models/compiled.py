"""Compiled forward passes."""

import torch
from torch import nn


def compile_forward(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles a module's forward pass, once for each shape of its inputs.

    Its hooks, and so FSDP2, which gathers weights in them, stay outside of what is compiled.
    backend: of torch.compile.
    """
    module.forward = torch.compile(module.forward, dynamic=False, backend=backend)
