"""Wan's text encoder (UMT5) and its tokenizer: prompts in, what the DiT reads out."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acetate.models.loading import locate, weights_sha256


class TextEncoder:
    """Tokenizer and encoder of a source in diffusers layout: a folder with tokenizer/ and text_encoder/, or a hub name.

    length: tokens that the DiT reads. Raises FileNotFoundError for a source without them.
    """

    def __init__(self, source: str, length: int, device: str = "cpu", dtype: str = "auto") -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel  # seconds to import, and caches often have the answer

        self.source, self.length, self.device = source, length, device
        folders = {part: locate(source, part) for part in ("tokenizer", "text_encoder")}
        for part, folder in folders.items():
            if folder.name != part:
                raise FileNotFoundError(
                    f"{source} has no folder {part}/. UMT5 is read in diffusers layout: give wan.text_encoder a folder "
                    "with tokenizer/ and text_encoder/, or a hub name such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
                )
        self.tokenizer = AutoTokenizer.from_pretrained(folders["tokenizer"])
        self.model = UMT5EncoderModel.from_pretrained(folders["text_encoder"], torch_dtype=dtype).to(device).eval()

    def sha256(self) -> str:
        """Of weights and vocabulary: embeddings of another encoder are refused by it."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{weights_sha256(self.model)}{vocabulary}".encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, prompt: str) -> Tensor:
        """(n, text_dim) fp32 on the CPU, n <= length tokens. Raises ValueError for a longer prompt."""
        tokens = self.tokenizer(prompt, return_tensors="pt").to(self.device)
        count = tokens.input_ids.shape[1]
        if count > self.length:
            raise ValueError(f"A prompt of {count} tokens; this model reads {self.length}. Shorten: {prompt[:80]!r}...")
        return self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float().cpu()

    def context(self, prompts: Sequence[str]) -> Tensor:
        """(B, length, text_dim) fp32 on the CPU, zeros after each prompt's last token, as Wan's DiT was trained."""
        return pad_context([self(prompt) for prompt in prompts], self.length)


def pad_context(embeds: Sequence[Tensor], length: int) -> Tensor:
    """(n, D) each -> (B, length, D), zeros after the last token, as Wan's DiT was trained."""
    return torch.stack([nn.functional.pad(x, (0, 0, 0, length - len(x))) for x in embeds])


def embed_prompt(prompt: str, source: str, length: int, cache: str) -> Tensor:
    """(1, length, text_dim) fp32, padded. Computed once per (source, prompt) and kept in the folder `cache`."""
    path = prompt_cache(prompt, source, length, cache)
    if path.is_file():
        return load_file(path)["embeds"]
    embeds = TextEncoder(source, length).context([prompt])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({"embeds": embeds}, temporary, {"prompt": prompt, "text_encoder": source})
    temporary.rename(path)
    return embeds


def prompt_cache(prompt: str, source: str, length: int, cache: str) -> Path:
    """Where the embedding is kept. Names change with the text encoder's files, so that retraining one is seen."""
    folder = Path(source).expanduser() / "text_encoder"
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    name = hashlib.sha256(json.dumps([source, prompt, length, files]).encode()).hexdigest()[:32]
    return Path(cache) / f"prompt-{name}.safetensors"
