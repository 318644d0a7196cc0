"""Compiled forward passes."""

import torch
from torch import nn

SHAPES = 64  # that are compiled before torch gives up and runs what was written


def compile_forward(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles a module's forward pass, once for each shape of its inputs.

    Its hooks, and so FSDP2, which gathers weights in them, stay outside of what is compiled.
    backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = SHAPES  # of its own accord it stops at 8
    module.forward = torch.compile(module.forward, dynamic=False, backend=backend)
