"""The pipeline's parts: the exact encoder, the tokenizer, and the recipe from end to end."""

import json
import shutil

import pytest
import torch

from perfusion.models import TOYBOX
from perfusion.toybox import train
from perfusion.toybox.judge import load_judge
from perfusion.toybox.model import LATENT_CHANNELS, build_tokenizer, vocabulary
from perfusion.toybox.render import render
from perfusion.toybox.vae import PatchAutoencoder
from perfusion.toybox.world import sample_pictures


def test_before_training_the_autoencoder_is_the_best_linear_one():
    images = render(sample_pictures(128, torch.Generator().manual_seed(0)))[0] * 2 - 1
    vae = PatchAutoencoder()
    vae.set_principal_components(images)
    with torch.no_grad():
        latents = vae.encode(images).latents
        restored = vae.decode(latents).sample
    patches = images.reshape(128, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double()
    mean = patches.mean(0)
    _, scales, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    variances = scales.square() / len(patches)
    best = variances[LATENT_CHANNELS:].sum() / 192
    assert best <= (restored - images).square().mean() < 1.01 * best
    scales = (variances / variances[:LATENT_CHANNELS].sum())[:LATENT_CHANNELS].sqrt()
    directions = directions[:LATENT_CHANNELS] * directions[:LATENT_CHANNELS].sum(1, keepdim=True).sign()
    expected = ((patches - mean) @ directions.T / scales.sqrt()).reshape(128, 8, 8, LATENT_CHANNELS).permute(0, 3, 1, 2)
    assert torch.allclose(latents.double(), expected, atol=1e-4)


def test_the_autoencoder_takes_any_multiple_of_the_patch_and_keeps_its_networks_when_saved(tmp_path):
    vae = PatchAutoencoder(scaling_factor=0.5)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    vae.save_pretrained(tmp_path)
    loaded, x = PatchAutoencoder.from_pretrained(tmp_path), torch.rand(2, 3, 24, 40) * 2 - 1
    latents = vae.encode(x).latents
    assert latents.shape == (2, LATENT_CHANNELS, 3, 5) and loaded.config.scaling_factor == 0.5
    assert torch.equal(loaded.decode(loaded.encode(x).latents, return_dict=False)[0], vae.decode(latents).sample)


def test_every_word_is_one_token_and_others_fall_to_letters(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in vocabulary())
    zebra = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(zebra) > 1 and tokenizer.unk_token_id not in zebra
    assert tokenizer("A RED Teddy").input_ids == tokenizer("a red teddy").input_ids


def test_the_same_ids_every_time(tmp_path):
    ids = [build_tokenizer(tmp_path / str(number)).get_vocab() for number in range(3)]
    assert ids[0] == ids[1] == ids[2]


RECIPE = ["--device", "cpu", "--pictures", "256", "--denoiser-steps", "4", "--autoencoder-steps", "4", "--judge-steps", "2"]


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

    whole = [("autoencoder", 1), ("autoencoder", 2), ("autoencoder", 3), ("autoencoder", 4)]
    whole += [("judge", 1), ("judge", 2), ("denoiser", 1), ("denoiser", 2), ("denoiser", 3), ("denoiser", 4)]
    stop_at = None
    run("whole")
    assert steps == whole
    written = {path.name for path in (tmp_path / "whole" / "weights").iterdir()}
    assert written >= {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "judge.safetensors", "covariance.safetensors"}
    log = [json.loads(line) for line in (tmp_path / "whole" / "work" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == ["autoencoder", "judge", "denoiser"]

    stop_at = 9  # the denoiser's third step
    with pytest.raises(InterruptedError):
        run("parts")
    halfway = denoiser("parts")
    stop_at = None
    run("parts")
    assert steps == whole[8:]
    assert torch.equal(denoiser("parts"), denoiser("whole")) and not torch.equal(denoiser("whole"), halfway)


def test_the_judge_can_be_trained_alone(tmp_path):
    """From the pipeline that is there, whose other files stay as they are."""
    weights = tmp_path / "weights"
    shutil.copytree(TOYBOX, weights)
    before = {path: path.read_bytes() for path in weights.rglob("*") if path.is_file()}
    train.main(["--work", str(tmp_path / "work"), "--output", str(weights), "--judge-alone", *RECIPE])
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"judge.safetensors"}
    load_judge(weights / "judge.safetensors")
