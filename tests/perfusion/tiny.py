"""Tiny random-weight diffusers pipelines with a real CLIP tokenizer, for tests.

    from tests.perfusion.tiny import tiny_sd, tiny_sdxl
    pipe = tiny_sd()
    image = pipe("a photo of a teddy", num_inference_steps=2, output_type="np").images[0]   # [16, 16, 3]

Nothing is downloaded, nothing is cached on disk, the global random state is left alone, and equal arguments give equal
weights. What such a pipeline draws is noise; what it computes has every shape, hook and code path of the full-size model:
77 tokens, several cross-attention layers of different widths and head counts, two text encoders for SDXL.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import random
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    KolorsPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLModularPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

IMAGE_SIZE = 16  # pixels per side; latents are 8 x 8

# Every word here is exactly one token. Any other text still tokenises, into several tokens: see SPLIT_WORDS.
WORDS = tuple(
    """
    a an the of in on at to with and or by near under over above below behind beside front from for is are no not
    photo picture image painting drawing sketch illustration render close up shot view bright dark good nice clean
    my one this that toy small large big tiny old new round tall wide striped dotted plain checkered fluffy wooden
    red green blue yellow orange purple pink brown black white grey gray teal gold silver
    teddy bear teapot cat dog tortoise cup mug vase ball box lamp chair house tree flower boat car bird fish
    person woman man child hat book robot kettle bottle clock star cube cone ring
    beach snow forest desert sea water sky grass field garden table floor wall room kitchen street city moon mountain river
    night day sunset wearing holding sitting standing swimming sailing riding reading
    """.split()
)
SPLIT_WORDS = ("armadillo", "zyx", "sks")  # more than one token each

# Options of a UNet of one block down and one up, for what compiles it.
SMALL = dict(block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
             mid_block_type=None, attention_head_dim=2)  # fmt: skip


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for the 256 byte values, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _merges(words) -> list[tuple[str, str]]:
    """BPE merges that make each word one token.

    A word is first split by the merges that exist, then what is left is joined from the left by new merges. New merges
    rank last, so they can never break up a word that was made before.
    """
    merges: list[tuple[str, str]] = []
    rank: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(zip(pieces, pieces[1:]))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                best = pairs[0]
                rank[best] = len(merges)
                merges.append(best)
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
    return merges


@functools.cache
def _tokenizer_files(words: tuple[str, ...] = WORDS) -> tuple[str, str, str]:
    """The three files of a CLIP tokenizer folder: vocab.json, merges.txt, tokenizer_config.json."""
    alphabet, merges = _byte_alphabet(), _merges(words)
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "pad_token": "<|endoftext|>"}
    return (
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        json.dumps(config),
    )


def tiny_tokenizer(pad_token: str = "<|endoftext|>", words: tuple[str, ...] = WORDS) -> CLIPTokenizer:
    """A fresh CLIPTokenizer (77 tokens, lower-casing, `words` single); SDXL's second one pads with "!"."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in zip(("vocab.json", "merges.txt", "tokenizer_config.json"), _tokenizer_files(words)):
            Path(folder, name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token)


def _text_config(tokenizer, width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(cross_attention_dim: int, **overrides) -> UNet2DConditionModel:
    config = dict(
        sample_size=IMAGE_SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=cross_attention_dim,
    )
    return UNet2DConditionModel(**{**config, **overrides})


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _finish(pipe, dtype: torch.dtype):
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def tiny_sd(
    *,
    width: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prediction_type: str = "epsilon",
    unet: dict | None = None,
) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x-shaped pipeline on the CPU, frozen, in eval mode.

    width: the text encoder's width D. seed: all weights. unet: overrides of the UNet2DConditionModel configuration.
    By default four cross-attention layers, in module order: down 8, up 8, up 8, mid 16 wide, of 2 heads (mid: 4).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(tokenizer, width, width)),
            tokenizer=tokenizer,
            unet=_unet(width, **(unet or {})),
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _finish(pipe, dtype)


def tiny_sdxl(
    *,
    widths: tuple[int, int] = (16, 24),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prediction_type: str = "epsilon",
    unet: dict | None = None,
) -> StableDiffusionXLPipeline:
    """An SDXL-shaped pipeline on the CPU: two text encoders of `widths`, D their sum, pooled text and size conditioning.

    By default eight cross-attention layers, two per attention block, 16 wide: two down, four up, two mid.
    """
    projection, time_dim = 12, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
        config = dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_dim,
            projection_class_embeddings_input_dim=6 * time_dim + projection,
        )
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(tokenizer, widths[0], widths[0])),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, widths[1], projection)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(sum(widths), **{**config, **(unet or {})}),
            scheduler=_scheduler(prediction_type),
            add_watermarker=False,
        )
    return _finish(pipe, dtype)


def tiny_t5_tokenizer(length: int = 300) -> T5Tokenizer:
    """A T5 tokenizer that knows `WORDS`, each one token, and letters; "teddy bear" are two tokens, "armadillo" nine."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0 - number / 1000) for number, word in enumerate(dict.fromkeys(WORDS))]
    known = {piece for piece, _ in pieces}
    pieces += [(letter, -10.0) for letter in map(chr, range(33, 127)) if letter not in known]
    if "vocab" in inspect.signature(T5Tokenizer).parameters:
        return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # transformers 4, whose own wants a SentencePiece file
    from transformers import T5TokenizerFast

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=length)


def _t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2,
                 feed_forward_proj="gated-gelu", dropout_rate=0.0)
    )  # fmt: skip


def tiny_pixart(
    kind: type = PixArtSigmaPipeline, *, width: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> PixArtSigmaPipeline:
    """A PixArt-shaped pipeline on the CPU: a T5 encoder of `width`, and a transformer that projects its output to D = 16.

    kind: `PixArtSigmaPipeline` or `PixArtAlphaPipeline`. overrides: of the PixArtTransformer2DModel configuration. Three
    cross-attention layers, 16 wide, of 2 heads, whose projections have biases; it predicts the noise and its variance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_t5_tokenizer()
        config = dict(
            sample_size=IMAGE_SIZE // 2, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, cross_attention_dim=16, caption_channels=width, num_embeds_ada_norm=1000,
        )  # fmt: skip
        transformer = PixArtTransformer2DModel(**{**config, **overrides})
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
        for block in transformer.transformer_blocks:
            for part in (block.attn2.to_k, block.attn2.to_v):
                torch.nn.init.normal_(part.bias, std=0.5)
        pipe = kind(tokenizer=tokenizer, text_encoder=_t5(tokenizer, width), vae=_vae(), transformer=transformer,
                    scheduler=_scheduler("epsilon"))  # fmt: skip
    return _finish(pipe, dtype)


@functools.cache
def _glm_vocabulary() -> tempfile.TemporaryDirectory:
    """A folder, as long as the process lives, with a sentencepiece model that knows `WORDS`, each one token, and letters."""
    import sentencepiece

    words, draw = list(dict.fromkeys(WORDS)), random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(draw.choices(words, k=8)) for _ in range(2000)), model_writer=model, vocab_size=320,
        model_type="unigram", hard_vocab_limit=False, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "tokenizer.model").write_bytes(model.getvalue())
    return folder


def tiny_kolors(*, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> KolorsPipeline:
    """A Kolors-shaped pipeline on the CPU: a GLM text encoder whose prompts are padded on the left, and a UNet that projects its
    states to D = 24; pooled text and sizes as SDXL has."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    time_dim = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = ChatGLMTokenizer(str(Path(_glm_vocabulary().name, "tokenizer.model")))  # it reads the file again to save it
        encoder = ChatGLMModel(
            ChatGLMConfig(
                num_layers=2, padded_vocab_size=len(tokenizer) + 16, hidden_size=width, ffn_hidden_size=2 * width, kv_channels=8,
                num_attention_heads=2, seq_length=64, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True,
                original_rope=True, use_cache=True,
            )
        )  # fmt: skip
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        config = dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=time_dim,
            projection_class_embeddings_input_dim=6 * time_dim + width, encoder_hid_dim=width, encoder_hid_dim_type="text_proj",
        )  # fmt: skip
        pipe = KolorsPipeline(vae=_vae(), text_encoder=encoder, tokenizer=tokenizer, unet=_unet(24, **config),
                              scheduler=_scheduler("epsilon"))  # fmt: skip
    return _finish(pipe, dtype)


def tiny_sdxl_modular(guider) -> StableDiffusionXLModularPipeline:
    """The parts of `tiny_sdxl` in diffusers' blocks for SDXL from text, with one of its guiders."""
    base = tiny_sdxl()
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    for name in parts:
        if not hasattr(base.components[name], "_diffusers_load_id"):  # diffusers 0.35 takes only what says where it was loaded from
            base.components[name]._diffusers_load_id = f"{name}|null|null|null"
    pipe.update_components(**{name: base.components[name] for name in parts}, guider=guider)
    return pipe
