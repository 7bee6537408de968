"""The toybox pipeline's parts, untrained: shapes small enough that two CPU cores can train all of them."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .vae import PatchAutoencoder
from .words import COLOURS, FRAMES, OBJECTS, PATTERNS, RELATIONS, SCENES, SIZES, STYLE_FRAMES

IMAGE_SIZE, LATENT_SIZE, LATENT_CHANNELS = 128, 16, 8
MAX_TOKENS, ENCODING_DIM = 32, 96
EXTRA_WORDS = "an and with of the my his her its two small big new old nice some any this that is are".split()


def vocabulary() -> list[str]:
    """Every word that must be one token, sorted."""
    texts = [*OBJECTS, *COLOURS, *PATTERNS, *SCENES, *SCENES.values(), *RELATIONS, *SIZES, *FRAMES, *STYLE_FRAMES.values(), *EXTRA_WORDS]
    return sorted({word for text in texts for word in text.replace("{}", "").split()})


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP byte-pair vocabulary in which each word of the world is one token; unknown words fall to letters."""
    words = vocabulary()
    raw = RawTokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    # no two words equally often: the trainer breaks ties at random, and ids must not change when a training is resumed
    raw.train_from_iterator((word for count, word in enumerate(words, start=1) for _ in range(count**2)), trainer)
    merges = json.loads(raw.to_str())["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS,
        unk_token="<|endoftext|>", bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    broken = [word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) != 1]
    if broken:
        raise RuntimeError(f"toybox tokenizer: every word of the world must be one token, but these are not: {broken}")
    return tokenizer


def make_readable_by_transformers_4(folder: Path) -> None:
    """Change a saved pipeline so that transformers 4 and 5 both load it.

    4 reads a CLIPTokenizer from vocab.json and merges.txt, which 5 does not write beside its tokenizer.json, and wants `text_model.`
    before the names of a text encoder's weights, with which 5 loads it as well. Without, 4 draws weights at random and warns.
    """
    tokenizer, weights = folder / "tokenizer", folder / "text_encoder" / "model.safetensors"
    if (tokenizer / "tokenizer.json").exists():
        model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
        (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=ENCODING_DIM, intermediate_size=2 * ENCODING_DIM, projection_dim=ENCODING_DIM,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def build_autoencoder(channels: int = LATENT_CHANNELS) -> PatchAutoencoder:
    """Pictures [B, 3, 128, 128] in [-1, 1] to latents [B, 8, 16, 16] of mean 0 and deviation about 1, and back."""
    return PatchAutoencoder(latent_channels=channels, widths=(48, 96), encoder_depths=(2, 3), decoder_depths=(3, 3))


def build_unet() -> UNet2DConditionModel:
    """5.25 M parameters; cross-attention widths 96, 128, 128, 128, 128, 96, 96 at head width 32."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        block_out_channels=(48, 96, 128), attention_head_dim=(1, 3, 4), norm_num_groups=16, cross_attention_dim=ENCODING_DIM,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing", steps_offset=1,  # diffusers asks for 1; trailing steps do not use it
    )  # fmt: skip


def build_pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids [B, 32], padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
