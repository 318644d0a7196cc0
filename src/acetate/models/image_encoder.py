"""The CLIP vision model that an image-to-video base such as Wan2.1-I2V-14B looks at the given
picture with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate.alpha import over
from acetate.models.configs import building, read_beside, read_config
from acetate.models.hub import refuse_code
from acetate.models.loading import locate, renamed, weights_sha256
from acetate.models.weights import assign, open_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

TOKENS = 257  # of Wan2.1's, ViT-H/14 at 224 pixels
GREY = 0.0  # of colour in [-1, 1], behind a transparent picture
# of files that hold more than the vision model reads
UNREAD = ("visual_projection.weight", "embeddings.position_ids")


class ImageEncoder:
    """Loads image_encoder/ (CLIPVisionModel) and image_processor/ of a source: a folder or a hub
    name in diffusers layout. In fp32, as Wan's pipelines of diffusers are used.

    tokens, width: of an embedding. Raises FileNotFoundError for a source without them, and
    ValueError for weights that do not fit and for code of its own.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import CLIPImageProcessor  # seconds to import

        folder, weights = (locate(source, part) for part in ("image_processor", "image_encoder"))
        for part, found in (("image_processor", folder), ("image_encoder", weights)):
            if found.name != part:
                raise FileNotFoundError(
                    f"{source} has no folder {part}/. Give wan.image_encoder a folder with "
                    "image_encoder/ and image_processor/, or a hub name such as "
                    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers."
                )
            refuse_code(found, f"wan.image_encoder={source}")
        self.processor = read_beside(CLIPImageProcessor, folder, "an image processor")
        self.source, self.device = source, device
        self.model: Any = load_clip(weights).to(device)
        config = self.model.config
        self.tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.width: int = config.hidden_size

    def sha256(self) -> str:
        """Hashes the weights: embeddings of another encoder are refused by it."""
        return weights_sha256(self.model)

    def facts(self) -> dict[str, Any]:
        """Returns what a cache says of its embeddings."""
        return {"sha256": self.sha256(), "tokens": self.tokens, "width": self.width}

    @torch.no_grad()
    def __call__(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Returns (B, tokens, width) fp32 on the CPU: the last hidden states but one, as Wan reads
        them, of pictures rgb (B, 3, H, W) in [-1, 1] and alpha (B, 1, H, W).

        CLIP knows pictures without alpha: it sees them softly over a mid-grey, the same in the
        cache and in sampling, whatever colour the VAE finds behind them.
        """
        seen = over(rgb.clamp(-1, 1), alpha.clamp(0, 1), torch.full_like(rgb, GREY))
        pixels = ((seen + 1) * 127.5).round().to(torch.uint8).cpu()
        inputs = self.processor(images=[*pixels], return_tensors="pt").to(self.device)
        return self.model(**inputs, output_hidden_states=True).hidden_states[-2].float().cpu()


def load_clip(path: Path) -> "CLIPVisionModel":
    """Loads a CLIP vision model from transformers' layout, in fp32. Raises ValueError as
    `load_vae`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    weights = open_weights(path)
    # transformers 5 has left a prefix out of its names
    names = renamed(weights.meta, lambda name: name.removeprefix("vision_model."))
    names = {name: key for name, key in names.items() if name not in UNREAD}
    config = read_config(path, "image_encoder", weights.meta)
    with building(path):
        model = CLIPVisionModel(CLIPVisionConfig.from_dict(config))
    assign(model, weights, names, lambda name: torch.float32)
    return model.eval().requires_grad_(False)


def encoder_of(
    transformer: WanTransformer3DModel, source: str | None, device: str = "cpu"
) -> ImageEncoder | None:
    """Loads the image encoder of a DiT; None for one that reads no embedding. Raises ValueError
    where there is no source, or its embeddings have another width than the DiT reads."""
    width = transformer.config.image_dim
    if width is None:
        return None
    if source is None:
        raise ValueError(
            f"This DiT reads a CLIP embedding of the picture ({width} wide), and "
            "wan.image_encoder=null. Give the folder or hub name that has image_encoder/, as "
            "wan=wan21_i2v_14b does."
        )
    encoder = ImageEncoder(source, device)
    if encoder.width != width:
        raise ValueError(
            f"wan.image_encoder={source} gives embeddings {encoder.width} wide, and this DiT reads "
            f"{width}. Give the image encoder of its own release."
        )
    return encoder
