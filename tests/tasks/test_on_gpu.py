"""The tasks on a GPU, which a machine without one can say this much about: nothing mixes devices or
generators."""

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer

from acetate import memory
from acetate.blank import blank_vae
from acetate.models.text import embed_prompt
from acetate.models.wan import Geometry
from tests.compose import composed
from tests.fake_gpu import fake_gpu

CHOICES = {
    "vae_rgba": [
        "loss.diffusion.mode=bidirectional",
        "task.moment_weight=0.1",
        "model.checkpointing=true",
    ],
    "dit_dora": ["data.latents=x", "rgba_vae=x", "task.checkpointing=true"],
}
RELEASED = {
    "vae_rgba": ["reproduce=upstream", "loss/perceptual=encoder_features"],
    "dit_dora": ["reproduce=upstream_dit"],
}


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("experiment", CHOICES)
def test_a_step_on_one_gpu(experiment, released, tmp_path, two_blocks):
    """From the base's files to the loss in bf16: configure_model as Lightning calls it, where the
    GPU is the default device, then training_step."""
    config = composed(
        tmp_path,
        f"experiment={experiment}",
        *CHOICES[experiment],
        *(RELEASED[experiment] * released),
        two_blocks,
    )
    task, wan = instantiate(config.task), config.wan
    # the judge's, whose tokens have numbers
    embed_prompt("", wan.text_encoder, wan.prompt_length, config.paths.cache)
    task.trainer = Trainer(accelerator="cpu", logger=False, log_every_n_steps=0)
    load = memory.Load(batch_size=2, frames=5, height=32, width=32, prompt_length=wan.prompt_length)
    with fake_gpu():
        with torch.device("cuda:0"):
            task.configure_model()
            batch = task.example_batch(load, Geometry.of(blank_vae(wan.vae)))
            if experiment == "dit_dora":
                batch["null_context"] = torch.empty_like(batch["context"][:1])
        task.to("cuda:0")
        with torch.autocast("cuda", torch.bfloat16):
            loss = task.training_step(batch, 0)["loss"]
        assert loss.device == torch.device("cuda:0") and loss.requires_grad
