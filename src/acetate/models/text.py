"""Wan's text encoder (UMT5) and its tokenizer: they turn prompts into the embeddings that the DiT
reads."""

import hashlib
import html
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from ftfy import fix_text
from safetensors.torch import load_file
from torch import Tensor, nn

from acetate.models.adapters import listed
from acetate.models.configs import building, read_beside, read_config
from acetate.models.hub import refuse_code
from acetate.models.loading import locate, renamed, weights_sha256
from acetate.models.weights import Weights, assign, open_weights
from acetate.replacing import new_mode, write_tensors

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel

ORIGINAL = "models_t5*"  # the original release's file of UMT5, beside the DiT
TOKENIZER = "google/umt5-xxl"  # and its tokenizer
# Wan's own names of UMT5's tensors -> transformers'; of a block below blocks.N and
# encoder.block.N.layer
TOP_NAMES = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
BLOCK_NAMES = {
    "norm1": "0.layer_norm",
    **{f"attn.{part}": f"0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
}


class TextEncoder:
    """Loads tokenizer and encoder of a source: a folder with tokenizer/ and text_encoder/, a hub
    name, or the original release's folder or file, with google/umt5-xxl/ beside it.

    length: tokens that the DiT reads. Raises FileNotFoundError for a source without them, and
    ValueError for weights that do not fit and for code of its own.
    """

    def __init__(self, source: str, length: int, device: str = "cpu", dtype: str = "auto") -> None:
        # seconds to import, and caches often have the answer
        from transformers import AutoTokenizer

        self.source, self.length, self.device = source, length, device
        tokenizer, weights = locate_text_encoder(source)
        for folder in {tokenizer, weights if weights.is_dir() else weights.parent}:
            refuse_code(folder, f"wan.text_encoder={source}")
        self.tokenizer = read_beside(
            AutoTokenizer, tokenizer, "a tokenizer", trust_remote_code=False
        )
        self.model = load_umt5(weights, None if dtype == "auto" else getattr(torch, dtype)).to(
            device
        )

    def sha256(self) -> str:
        """Hashes weights and vocabulary: embeddings of another encoder are refused by it."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{weights_sha256(self.model)}{vocabulary}".encode()).hexdigest()

    def tokens(self, prompt: str) -> int:
        """Returns how many tokens the prompt has, its end included."""
        return len(self.tokenizer(mended(prompt)).input_ids)

    @torch.no_grad()
    def __call__(self, prompt: str, truncate: bool = False) -> Tensor:
        """Embeds a prompt: (n, text_dim) fp32 on the CPU, n <= length tokens.

        A longer prompt is a ValueError; with `truncate` its first tokens and its end count, as in
        Wan's own code, and it warns.
        """
        count = self.tokens(prompt)
        if count > self.length and not truncate:
            raise ValueError(
                f"A prompt of {count} tokens; this model reads {self.length}. Shorten: "
                f"{prompt[:80]!r}..."
            )
        tokens = self.tokenizer(
            mended(prompt), return_tensors="pt", truncation=True, max_length=self.length
        )
        if count > self.length:
            read = self.tokenizer.decode(tokens.input_ids[0, :-1])[-60:]
            warnings.warn(
                f"A prompt of {count} tokens is cut to the {self.length} that this model reads, "
                f"after {read!r}.",
                stacklevel=3,
            )
        tokens = tokens.to(self.device)
        return (
            self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float().cpu()
        )

    def context(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Embeds prompts: (B, length, text_dim) fp32 on the CPU, zeros after each prompt's last
        token, as Wan's DiT was trained."""
        return pad_context([self(prompt, truncate) for prompt in prompts], self.length)


def mended(prompt: str) -> str:
    """Puts broken Unicode, HTML entities and runs of white space right, as Wan's own tokenizer
    does."""
    return " ".join(html.unescape(html.unescape(fix_text(prompt))).split())


def locate_text_encoder(source: str) -> tuple[Path, Path]:
    """Returns the folder of the tokenizer, and file or folder of UMT5's weights. Raises
    FileNotFoundError."""
    file = original_file(source)
    if file is not None:
        tokenizer = file.parent / TOKENIZER
        if not tokenizer.is_dir():
            raise FileNotFoundError(
                f"{tokenizer} does not exist; {file.name} needs its tokenizer beside it."
            )
        return tokenizer, file
    tokenizer, weights = (locate(source, part) for part in ("tokenizer", "text_encoder"))
    for part, folder in (("tokenizer", tokenizer), ("text_encoder", weights)):
        if folder.name != part:
            raise FileNotFoundError(
                f"{source} has no folder {part}/, and no {ORIGINAL}.pth of the original release. "
                "Give wan.text_encoder a folder with one or the other, or a hub name such as "
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
            )
    return tokenizer, weights


def original_file(source: str) -> Path | None:
    """Returns UMT5's file of the original release, where `source` is that file or a folder with
    it."""
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "text_encoder").is_dir():
        found = sorted(path.glob(ORIGINAL))
        if len(found) > 1:
            raise ValueError(
                f"{path} holds {listed([file.name for file in found])}. Name one of the files."
            )
        return found[0] if found else None
    return path if path.is_file() else None


def load_umt5(path: Path, dtype: torch.dtype | None = None) -> "UMT5EncoderModel":
    """Loads UMT5 from transformers' layout or Wan's own names; dtype None keeps the files'. Raises
    ValueError as `load_vae`."""
    from transformers import UMT5Config, UMT5EncoderModel

    weights = open_weights(path)
    if "token_embedding.weight" in weights.meta:
        config, names = _original_config(weights), renamed(weights.meta, umt5_name)
    else:
        stored, names = read_config(path, "text_encoder", weights.meta), renamed(weights.meta)
        with building(path):
            config = UMT5Config.from_dict(stored)
    with building(weights.path):
        model = UMT5EncoderModel(config)
    # one matrix; files hold it under one name or both
    tied = {"shared.weight", "encoder.embed_tokens.weight"}
    if held := tied & names.keys():
        names |= {name: names[min(held, key=len)] for name in tied}
    kept: Any = config.dtype
    dtype = dtype or kept or next(iter(weights.meta.values())).dtype
    # as transformers does
    precise = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    assign(
        model, weights, names, lambda name: torch.float32 if precise & {*name.split(".")} else dtype
    )
    model.tie_weights()
    return model.eval().requires_grad_(False)


def umt5_name(original: str) -> str:
    """Translates Wan's own name of a tensor of UMT5 into transformers'; a name that Wan does not
    have stays."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", original)
    if match and match[2] in BLOCK_NAMES:
        return f"encoder.block.{match[1]}.layer.{BLOCK_NAMES[match[2]]}.weight"
    return TOP_NAMES.get(original, original)


def _original_config(weights: Weights) -> "UMT5Config":
    from transformers import UMT5Config

    vocabulary, width = weights.shape("token_embedding.weight")
    buckets, heads = weights.shape("blocks.0.pos_embedding.embedding.weight")
    blocks = {
        int(match[1]) for name in weights.meta if (match := re.match(r"blocks\.(\d+)\.", name))
    }
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=weights.shape("blocks.0.attn.q.weight")[0] // heads,
        d_ff=weights.shape("blocks.0.ffn.gate.0.weight")[0],
        num_layers=len(blocks),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        pad_token_id=0,
        eos_token_id=1,
    )


def pad_context(embeds: Sequence[Tensor], length: int) -> Tensor:
    """Pads embeddings (n, D) each to (B, length, D), zeros after the last token, as Wan's DiT was
    trained."""
    return torch.stack([nn.functional.pad(x, (0, 0, 0, length - len(x))) for x in embeds])


def embed_prompt(prompt: str, source: str, length: int, cache: str) -> Tensor:
    """Embeds a prompt: (1, length, text_dim) fp32, padded. It is computed once per (source, prompt)
    and kept in the folder `cache`; of the ranks of a machine one computes it, since each would need
    UMT5's 11 GB, and the others wait."""
    path = prompt_cache(prompt, source, length, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        return load_file(path)["embeds"]
    with FileLock(path.with_suffix(".lock"), mode=new_mode()):
        if path.is_file():
            return load_file(path)["embeds"]
        embeds = TextEncoder(source, length).context([prompt])
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        write_tensors({"embeds": embeds}, temporary, {"prompt": prompt, "text_encoder": source})
        temporary.rename(path)
    return embeds


def prompt_cache(prompt: str, source: str, length: int, cache: str) -> Path:
    """Returns the file of the cached embedding. Names change with the text encoder's files, so that
    retraining one is seen."""
    original = original_file(source)
    folder = Path(source).expanduser() / "text_encoder"
    kept = sorted(folder.glob("*.safetensors")) if original is None else [original]
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in kept]
    name = hashlib.sha256(json.dumps([source, prompt, length, files]).encode()).hexdigest()[:32]
    return Path(cache) / f"prompt-{name}.safetensors"
