"""A vision-language model of transformers that says what is seen in a clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from acetate.alpha import checkerboard, over
from acetate.data.transforms import to_float
from acetate.models.hub import from_hub, is_hub_name, refuse_code

GREY = 0.0  # in [-1, 1]
# of a repository
NOT_READ = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py")


@dataclass(frozen=True)
class Look:
    """The way a clip is shown: `pictures` frames of it, over grey or a checkerboard, as several
    images or as one sheet."""

    pictures: int
    images: Literal["several", "sheet"]
    background: Literal["grey", "checkerboard"]

    def of(self, frames: NDArray[np.uint8]) -> list[Image.Image]:
        """Makes the images of frames (T, H, W, 4), in the order of time."""
        places = (
            np.linspace(0, len(frames) - 1, min(self.pictures, len(frames))).round().astype(int)
        )
        tiles = [composite(frames[place], self.background) for place in places]
        return [sheet(tiles)] if self.images == "sheet" else tiles


def composite(frame: NDArray[np.uint8], background: str) -> Image.Image:
    """Lays (H, W, 4) over a background that no subject is likely to have."""
    rgb, alpha = to_float(torch.from_numpy(frame[None].copy()))
    ground = checkerboard(*frame.shape[:2]) if background == "checkerboard" else torch.tensor(GREY)
    seen = over(rgb, alpha, ground)[:, 0]
    return Image.fromarray(((seen + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    """Lays tiles in rows, as nearly as many as columns."""
    columns = int(np.ceil(len(tiles) ** 0.5))
    width, height = tiles[0].size
    whole = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), (128, 128, 128))
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i % columns * width, i // columns * height))
    return whole


def locate_captioner(name: str) -> Path:
    """Returns the folder of a captioner. Raises FileNotFoundError within seconds for one that is
    not there."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not is_hub_name(name):
        lost = "holds no config.json" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"captioner={name} {lost}; give the folder of an image-text-to-text model of "
            "transformers, or a hub name such as HuggingFaceTB/SmolVLM2-500M-Video-Instruct."
        )
    return from_hub(name, "captioner", ignore=NOT_READ)


class Captioner:
    """folder: of transformers' image-text-to-text kind. Weights are read from safetensors only,
    code is not run.

    The answer is the most likely one, so that it depends on the pictures alone. A processor without
    a chat template (BLIP and its like) takes one sheet, and the instruction is not said.
    """

    def __init__(
        self,
        folder: Path,
        *,
        instruction: str,
        look: Look,
        max_tokens: int,
        dtype: str,
        device: str,
    ):
        refuse_code(Path(folder), "captioner")
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
        self.model = model.to(device).eval()
        self.chats = getattr(self.processor, "chat_template", None) is not None
        self.instruction, self.max_tokens = instruction, max_tokens
        self.look = look if self.chats else Look(look.pictures, "sheet", look.background)

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> str:
        """Describes frames, uint8 (T, H, W, 4), in one line. Raises ValueError if the model says
        nothing."""
        images = self.look.of(frames)
        if self.chats:
            content = [*({"type": "image", "image": image} for image in images)]
            messages = [
                {"role": "user", "content": [*content, {"type": "text", "text": self.instruction}]}
            ]
            inputs = self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            said = inputs["input_ids"].shape[1]
        else:
            inputs, said = self.processor(images=images[0], return_tensors="pt"), 0
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        text = self.processor.batch_decode(tokens[:, said:], skip_special_tokens=True)[0]
        if not text.strip():
            raise ValueError(
                "the captioner said nothing; try another instruction, more max_tokens or another "
                "model"
            )
        return " ".join(text.split())
