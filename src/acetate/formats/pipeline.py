"""Builds files for diffusers and PEFT: a whole WanPipeline, and the adapters as PEFT keeps them."""

from pathlib import Path
from typing import cast

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from acetate.models.condition import condition_channels
from acetate.models.image_encoder import ImageEncoder
from acetate.models.text import TextEncoder
from acetate.replacing import write_tensors


def wan_pipeline(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    text: TextEncoder,
    scheduler: UniPCMultistepScheduler,
    low: WanTransformer3DModel | None = None,
    boundary: float | None = None,
    image: ImageEncoder | None = None,
) -> WanPipeline | WanImageToVideoPipeline:
    """Builds a pipeline whose `save_pretrained` writes the folder that `from_pretrained` of its
    class reads; that of an image-to-video DiT is WanImageToVideoPipeline. low, boundary: the
    low-noise expert of a base with two, and the share of the steps from which on `transformer`
    works. image: the encoder of a DiT that reads CLIP embeddings."""
    kind = WanImageToVideoPipeline if condition_channels(transformer) else WanPipeline
    of_image = {"image_encoder": image.model, "image_processor": image.processor} if image else {}
    return kind(
        tokenizer=text.tokenizer,
        text_encoder=text.model,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        transformer_2=low,
        boundary_ratio=boundary,
        **of_image,
    )


class PEFTAdapter:
    """Keeps the DoRA that `transformer` carries now, to be written after it was merged."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        self.config = cast(LoraConfig, transformer.peft_config["default"])
        state = get_peft_model_state_dict(transformer, adapter_name="default")
        self.state: dict[str, Tensor] = {
            f"base_model.model.{name}": value.cpu() for name, value in state.items()
        }

    def save_pretrained(self, folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, for
        `PeftModel.from_pretrained(transformer, folder)`."""
        self.config.inference_mode = True
        self.config.save_pretrained(str(folder))
        write_tensors(self.state, folder / "adapter_model.safetensors", {"format": "pt"})
