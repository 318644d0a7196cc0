"""Random vision-language models of a few thousand weights, saved as transformers loads them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("<pad>", "</s>", "<unk>", "<image>", "a", "red", "star", "turning", "describe")
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == "
    "'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PICTURE = {"image_size": 16, "patch_size": 8, "projection_dim": 16}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def save_llava(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )
    from transformers import LlavaForConditionalGeneration as Llava

    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16,
        "width": 16}),
        tokenizer=tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    text = LlamaConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=128, pad_token_id=0,
        eos_token_id=1,
                       bos_token_id=None)  # fmt: skip
    vision = CLIPVisionConfig(**{**SMALL, "num_hidden_layers": 2}, **PICTURE)
    torch.manual_seed(0)
    Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)).save_pretrained(
        folder
    )


def save_blip(folder: Path) -> None:
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    size = {"height": 16, "width": 16}
    BlipProcessor(
        image_processor=BlipImageProcessor(size=size), tokenizer=tokenizer()
    ).save_pretrained(folder)
    text = {**SMALL, "encoder_hidden_size": 16, "vocab_size": len(WORDS),
        "max_position_embeddings": 32,
            "pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 1, "sep_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    config = BlipConfig(vision_config={**SMALL, **PICTURE}, text_config=text, projection_dim=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
