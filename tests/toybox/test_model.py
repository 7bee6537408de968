"""The pipeline's parts: the exact encoder, the tokenizer, and the recipe from end to end."""

import json

import torch
from transformers import CLIPTokenizer

from perfusion.toybox import train
from perfusion.toybox.model import LATENT_CHANNELS, build_tokenizer, build_vae, set_principal_components, vocabulary
from perfusion.toybox.render import render
from perfusion.toybox.world import sample_pictures


def test_the_encoder_is_the_principal_components():
    images = render(sample_pictures(128, torch.Generator().manual_seed(0)))[0]
    vae = build_vae()
    set_principal_components(vae, images)
    with torch.no_grad():
        latents = vae.encode(images[:4] * 2 - 1).latents
    patches = images.reshape(128, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double()
    mean = patches.mean(0)
    _, scales, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    scales = (scales / len(patches) ** 0.5)[:LATENT_CHANNELS]
    directions = directions[:LATENT_CHANNELS] * directions[:LATENT_CHANNELS].sum(1, keepdim=True).sign()
    expected = ((patches - mean) @ directions.T * scales**-0.8).reshape(128, 8, 8, LATENT_CHANNELS).permute(0, 3, 1, 2)
    assert torch.allclose(latents.double(), expected[:4], atol=1e-4)


def test_every_word_is_one_token_and_others_fall_to_letters(tmp_path):
    build_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path) if (tmp_path / "tokenizer_config.json").exists() else build_tokenizer(tmp_path)
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in vocabulary())
    zebra = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(zebra) > 1 and tokenizer.unk_token_id not in zebra
    assert tokenizer("A RED Teddy").input_ids == tokenizer("a red teddy").input_ids


RECIPE = ["--device", "cpu", "--pictures", "256", "--denoiser-steps", "4", "--decoder-steps", "4", "--judge-steps", "2"]


def test_the_recipe_runs_and_resumes(tmp_path, monkeypatch):
    """Interrupted between two steps and run again, it ends at the same weights."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    train.main(["--work", str(tmp_path / "a"), "--output", str(tmp_path / "whole"), *RECIPE])
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"model_index.json", "judge.safetensors", "covariance.safetensors"}
    stages = [json.loads(line)["stage"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert stages == ["denoiser", "decoder", "judge"]

    class Stop(Exception):
        pass

    average, calls = train.Stage._average, []

    def stopping(stage):
        calls.append(stage)
        if len(calls) == 3:
            raise Stop
        average(stage)

    monkeypatch.setattr(train.Stage, "_average", stopping)
    arguments = ["--work", str(tmp_path / "b"), "--output", str(tmp_path / "resumed"), *RECIPE]
    try:
        train.main(arguments)
    except Stop:
        pass
    assert len(calls) == 3 and not (tmp_path / "resumed").exists()
    monkeypatch.setattr(train.Stage, "_average", average)
    train.main(arguments)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "judge"):
        assert (tmp_path / "whole" / f"{part}.safetensors").read_bytes() == (tmp_path / "resumed" / f"{part}.safetensors").read_bytes()
