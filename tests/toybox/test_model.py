"""The pipeline's parts: the exact encoder, the tokenizer, and the recipe from end to end."""

import json

import pytest
import torch

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
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in vocabulary())
    zebra = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(zebra) > 1 and tokenizer.unk_token_id not in zebra
    assert tokenizer("A RED Teddy").input_ids == tokenizer("a red teddy").input_ids


def test_the_same_ids_every_time(tmp_path):
    ids = [build_tokenizer(tmp_path / str(number)).get_vocab() for number in range(3)]
    assert ids[0] == ids[1] == ids[2]


RECIPE = ["--device", "cpu", "--pictures", "256", "--denoiser-steps", "4", "--decoder-steps", "4", "--judge-steps", "2"]


def test_the_recipe_runs_and_resumes(tmp_path, monkeypatch):
    """Interrupted between two checkpoints and run again, it goes on from the first and ends where it would have ended."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    average, steps = train.Stage._average, []

    def counting(stage):
        steps.append((stage.name, stage.step))
        if len(steps) == stop_at:
            raise InterruptedError
        average(stage)

    monkeypatch.setattr(train.Stage, "_average", counting)

    def run(name):
        steps.clear()
        train.main(["--work", str(tmp_path / name / "work"), "--output", str(tmp_path / name / "weights"), *RECIPE])

    def denoiser(name):
        state = torch.load(tmp_path / name / "work" / "denoiser.pt", weights_only=True)["model"]
        return torch.cat([tensor.flatten().float() for tensor in state.values()])

    whole = [("denoiser", 1), ("denoiser", 2), ("denoiser", 3), ("denoiser", 4)]
    whole += [("decoder", 1), ("decoder", 2), ("decoder", 3), ("decoder", 4), ("judge", 1), ("judge", 2)]
    stop_at = None
    run("whole")
    assert steps == whole
    written = {path.name for path in (tmp_path / "whole" / "weights").iterdir()}
    assert written >= {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "judge.safetensors", "covariance.safetensors"}
    log = [json.loads(line) for line in (tmp_path / "whole" / "work" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == ["denoiser", "decoder", "judge"]

    stop_at = 3
    with pytest.raises(InterruptedError):
        run("parts")
    halfway = denoiser("parts")
    stop_at = None
    run("parts")
    assert steps == whole[2:]
    assert torch.equal(denoiser("parts"), denoiser("whole")) and not torch.equal(denoiser("whole"), halfway)
