"""The pipeline's parts: the exact encoder, the tokenizer, and the recipe from end to end."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perfusion.toybox import ablate, train
from perfusion.toybox.model import LATENT_CHANNELS, build_tokenizer, vocabulary
from perfusion.toybox.recipe import judge, pictures, stage
from perfusion.toybox.render import render
from perfusion.toybox.vae import PatchAutoencoder
from perfusion.toybox.world import sample_pictures

pytestmark = pytest.mark.toybox


def test_before_training_the_autoencoder_is_the_best_linear_one():
    images = render(sample_pictures(64, torch.Generator().manual_seed(0)))[0] * 2 - 1
    vae = PatchAutoencoder(latent_channels=LATENT_CHANNELS)
    vae.set_principal_components(images)
    with torch.no_grad():
        latents = vae.encode(images).latents
        restored = vae.decode(latents).sample
    patches = images.reshape(64, 3, 16, 8, 16, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double()
    mean = patches.mean(0)
    _, scales, directions = torch.linalg.svd(patches - mean, full_matrices=False)
    variances = scales.square() / len(patches)
    best = variances[LATENT_CHANNELS:].sum() / 192
    assert best <= (restored - images).square().mean() < 1.01 * best
    scales = (variances / variances[:LATENT_CHANNELS].sum())[:LATENT_CHANNELS].sqrt()
    directions = directions[:LATENT_CHANNELS] * directions[:LATENT_CHANNELS].sum(1, keepdim=True).sign()
    expected = ((patches - mean) @ directions.T / scales.sqrt()).reshape(64, 16, 16, LATENT_CHANNELS).permute(0, 3, 1, 2)
    assert torch.allclose(latents.double(), expected, atol=1e-4)


def test_the_autoencoder_takes_any_multiple_of_the_patch_and_keeps_its_networks_when_saved(tmp_path):
    vae = PatchAutoencoder(latent_channels=LATENT_CHANNELS, scaling_factor=0.5)
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


RECIPE = ["--device", "cpu", "--pictures", "48", "--autoencoder-steps", "2", "--text-steps", "2", "--judge-steps", "2", "--batch", "4"]
RECIPE += ["--denoiser-steps", "4", "--annealing-steps", "2"]


def test_the_recipe_runs_and_resumes(tmp_path, monkeypatch):
    """Interrupted between two checkpoints and run again, it goes on from the first and ends where it would have ended."""
    monkeypatch.setattr(stage, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "COVARIANCE_CAPTIONS", 200)
    monkeypatch.setattr(pictures, "PER_FILE", 48)  # a batch of the judge's
    monkeypatch.setattr(judge, "INSTANCES", 64)
    monkeypatch.setattr(judge, "REPEATS", 2)
    average, steps = stage.Stage._average, []

    def counting(self):
        steps.append((self.name, self.step))
        if len(steps) == stop_at:
            raise InterruptedError
        average(self)

    monkeypatch.setattr(stage.Stage, "_average", counting)

    def run(name):
        steps.clear()
        train.main(["--work", str(tmp_path / name / "work"), "--output", str(tmp_path / name / "weights"), *RECIPE])

    def denoiser(name):
        state = torch.load(tmp_path / name / "work" / "denoiser.pt", weights_only=True)["model"]
        return torch.cat([tensor.flatten().float() for tensor in state.values()])

    def weights(name):
        folder = tmp_path / name / "weights"
        files = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
        return {path: {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} for path, tensors in files.items()}

    whole = [(part, step) for part in ("autoencoder", "text", "judge") for step in (1, 2)]
    whole += [("denoiser", step) for step in (1, 2, 3, 4)] + [("denoiser-annealed-2", step) for step in (1, 2)]
    stop_at = None
    run("whole")
    assert steps == whole
    written = {path.name for path in (tmp_path / "whole" / "weights").iterdir()}
    assert written >= {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "judge.safetensors", "covariance.safetensors"}
    log = [json.loads(line) for line in (tmp_path / "whole" / "work" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == ["autoencoder", "text", "judge", "denoiser", "denoiser-annealed-2"]

    stop_at = 9  # the denoiser's third step
    with pytest.raises(InterruptedError):
        run("parts")
    halfway = denoiser("parts")
    stop_at = None
    run("parts")
    assert steps == whole[8:]
    assert torch.equal(denoiser("parts"), denoiser("whole")) and not torch.equal(denoiser("whole"), halfway)
    before = weights("whole")
    assert weights("parts") == before

    # training goes on from finished weights: all but the UNet stay as they are
    train.main(
        ["--work", str(tmp_path / "more" / "work"), "--output", str(tmp_path / "more" / "weights"),
         "--from", str(tmp_path / "whole" / "weights"), *RECIPE]
    )  # fmt: skip
    after = weights("more")
    assert after.keys() == before.keys()
    assert {str(path.parent) for path in after if after[path] != before[path]} == {"unet"}


@pytest.mark.proof
def test_ablations_run_and_resume(tmp_path):
    """Of the shipped model: a row for each choice, and a second run trains nothing again."""
    options = ["--pictures", "256", "--steps", "4", "--autoencoder-steps", "2", "--samples", "2"]
    for name in ("first", "second"):
        ablate.main(["--work", str(tmp_path / "work"), "--output", str(tmp_path / name), *options])
    rows, again = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("first", "second"))
    assert [(row["choice"], row["variant"], row["steps"]) for row in rows] == [
        ("latents", "16×16×4", 2), ("latents", "16×16×8", 2), ("steps", "as shipped", 1), ("steps", "as shipped", 2),
        ("captions and pictures", "as shipped", 4), ("captions and pictures", "mirrored", 4),
        ("captions and pictures", "patterns unsaid in 30 %", 4),
    ]  # fmt: skip
    assert [row["psnr"] for row in again[:2]] == [row["psnr"] for row in rows[:2]]
    log = [json.loads(line)["step"] for line in (tmp_path / "work" / "ablation-as" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 4]
