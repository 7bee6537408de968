"""The second moment of encodings: what it counts, what it says about itself, and what its file is checked for."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perfusion.captions import everyday_captions
from perfusion.covariance import Covariance, CovarianceError, get_covariance
from tests.kernels.tolerance import assert_agree, assert_close, exactly
from tests.perfusion.covariances import compute, final_norm, trained_sd
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

FEW = ["a photo of a red cat", "teapot", "a dog and a cat on the beach at night, painting", "", "zyx armadillo"]


@pytest.fixture(scope="module")
def captions():
    return list(everyday_captions(120))


@pytest.fixture(scope="module")
def sd():
    return trained_sd()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def rows_of(pipe, captions) -> torch.Tensor:
    """Encodings [rows, D], float64. One caption at a time, one token at a time: start, words and the first end; the layers diffusers' UNet reads."""
    xl = hasattr(pipe, "text_encoder_2")
    rows = []
    for caption in captions:
        parts = []
        for tokenizer, encoder in [(pipe.tokenizer, pipe.text_encoder)] + ([(pipe.tokenizer_2, pipe.text_encoder_2)] if xl else []):
            words = tokenizer(caption, add_special_tokens=False).input_ids[:75]
            ids = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            padded = torch.tensor([ids + [tokenizer.pad_token_id] * (77 - len(ids))])
            with torch.no_grad():
                output = encoder(padded, output_hidden_states=True)
            hidden = output.hidden_states[-2] if xl else output.last_hidden_state
            parts.append(hidden[0, : len(ids)])
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows).double()


def moment_of(rows):
    return rows.T @ rows / len(rows)


def condition_of(moment):
    eigenvalues = torch.linalg.eigvalsh(moment)
    return eigenvalues[-1] / eigenvalues[0]


# ---- what is counted --------------------------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("make", [trained_sd, tiny_sdxl])
def test_equals_a_loop_over_real_tokens(make, captions):
    """SDXL: the penultimate hidden layers of both encoders, side by side, and its second tokenizer pads with "!"."""
    pipe = make(dtype=torch.float64)
    covariance = compute(pipe, captions)
    rows = rows_of(pipe, captions)
    assert covariance.matrix.dtype == torch.float64 and covariance.width == rows.shape[1]
    assert (covariance.captions, covariance.tokens, covariance.shrinkage) == (120, len(rows), 0)
    assert_close(covariance.matrix, *exactly(moment_of, rows))
    (condition,) = exactly(lambda: condition_of(moment_of(rows)))
    assert covariance.condition == covariance.condition_before
    assert_close(torch.tensor(covariance.condition, dtype=torch.float64), condition)


@pytest.mark.filterwarnings("ignore:the covariance of:UserWarning")
def test_padding_is_not_counted(sd):
    assert compute(sd, ["red cat"]).tokens == 4
    assert compute(sd, FEW).tokens == len(rows_of(sd, FEW))


def test_a_truncated_caption_counts_77_tokens_and_diffusers_does_not_complain(sd, captions, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # some versions keep their words from caplog
    long = "red cat " * 60
    with caplog.at_level(logging.WARNING):
        covariance = compute(sd, [long, *captions])
    assert covariance.tokens == compute(sd, captions).tokens + 77
    assert "truncated" not in caplog.text
    sd.encode_prompt(long, "cpu", 1, False)
    assert "truncated" in caplog.text, "the pipeline's own warning must come back afterwards"


@pytest.mark.numeric
@pytest.mark.parametrize("batch_size", [1, 7, 120, 1000])
def test_batch_size_does_not_matter(sd, captions, batch_size):
    expected = compute(sd, captions)
    covariance = compute(sd, iter(captions), batch_size=batch_size)
    assert_close(covariance.matrix, *exactly(moment_of, rows_of(sd, captions)))
    assert (covariance.tokens, covariance.source) == (expected.tokens, expected.source)


@pytest.mark.numeric
def test_half_precision_encoders_are_summed_in_float64(captions):
    """Sums in float16 stop growing at 2048 times a term. One caption at a time, as the loop has them, each encoding is the same."""
    half = trained_sd(torch.float16)
    covariance = compute(half, captions, batch_size=1)
    assert_close(covariance.matrix, *exactly(moment_of, rows_of(half, captions)))


def test_modes_and_gradients_are_left_alone(captions):
    pipe = trained_sd(torch.float32)
    pipe.text_encoder.requires_grad_(True).train()
    final_norm(pipe.text_encoder).eval()
    modes = [module.training for module in pipe.text_encoder.modules()]
    seen = []
    hook = pipe.text_encoder.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    compute(pipe, captions)
    hook.remove()
    assert set(seen) == {(False, False)}
    assert [module.training for module in pipe.text_encoder.modules()] == modes


def test_not_finite_encodings_are_refused(captions):
    pipe = tiny_sd()
    final_norm(pipe.text_encoder).bias[3] = float("inf")
    with pytest.raises(CovarianceError, match="not finite for one of .*float32"):
        compute(pipe, captions)


def test_bad_arguments_are_refused(sd, captions):
    with pytest.raises(ValueError, match="no captions"):
        compute(sd, [])
    with pytest.raises(ValueError, match="must be several strings, not one"):
        compute(sd, "a cat")
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        compute(sd, captions, batch_size=0)
    with pytest.raises(ValueError, match="max_condition must be above 1 and at most 1e12, not 1e\\+13"):
        compute(sd, captions, max_condition=1e13)
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        get_covariance(sd, count=0)


# ---- shrinkage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_too_few_captions_are_shrunk_and_say_so(sd):
    few = ["red cat", "blue dog"]  # 8 tokens, of which 4 are distinct, for 16 dimensions
    with pytest.warns(UserWarning, match=r"condition number .*, above 1\.0e\+03; 8 tokens are few for 16 dimensions: shrunk by"):
        covariance = compute(sd, few, max_condition=1e3)
    raw = moment_of(rows_of(sd, few))
    assert covariance.condition_before > 1e12
    (condition,) = exactly(condition_of, covariance.matrix)
    assert_close(torch.tensor(covariance.condition, dtype=torch.float64), condition)
    assert_close(torch.tensor(1e3, dtype=torch.float64), condition)
    weight = covariance.shrinkage
    assert 0 < weight < 1
    assert_close(covariance.matrix, *exactly(lambda: (1 - weight) * raw + weight * raw.diagonal().mean() * torch.eye(16).double()))


def test_an_encoder_whose_encodings_sum_to_zero_is_shrunk_a_little(captions):
    """The singular direction of `trained_sd`'s note. It takes a weight of 1e-5, nothing compared with the other eigenvalues."""
    with pytest.warns(UserWarning, match=r"condition number .*, above 1\.0e\+06: shrunk by"):
        covariance = compute(tiny_sd(dtype=torch.float64), captions)
    eigenvalues, vectors = torch.linalg.eigh(covariance.matrix)
    assert 0 < covariance.shrinkage < 1e-5 and eigenvalues[1] > 1e-3
    assert vectors[:, 0].abs().sub(0.25).abs().max() < 1e-3  # (1, …, 1) / √16


def test_a_well_conditioned_covariance_is_left_alone_and_silent(sd, captions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        covariance = compute(sd, captions)
    assert covariance.shrinkage == 0 and covariance.condition <= covariance.max_condition


# ---- the object and its file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(sd, captions, tmp_path) -> Path:
    return compute(sd, captions, source="unit test").save(tmp_path / "folder" / "c.safetensors").path


@pytest.mark.numeric
def test_metric_targets(sd, captions):
    covariance = compute(sd, captions)
    targets = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_agree(lambda: covariance.metric_targets(targets) @ covariance.matrix, lambda: targets)
    assert covariance.metric_targets(targets.half()).dtype == torch.float32


def test_save_and_load(sd, captions, saved):
    covariance, loaded = compute(sd, captions, source="unit test"), Covariance.load(saved)
    assert torch.equal(loaded.matrix, covariance.matrix)
    for field in dataclasses.fields(Covariance):
        if field.name not in ("matrix", "path"):
            assert getattr(loaded, field.name) == getattr(covariance, field.name), field.name
    assert loaded.path == saved and loaded.fingerprint == covariance.fingerprint and len(loaded.fingerprint) == 16
    assert [path.name for path in saved.parent.iterdir()] == ["c.safetensors"], "no draft may stay behind"


def test_the_fingerprint_follows_the_values(sd, captions):
    covariance = compute(sd, captions)
    changed = dataclasses.replace(covariance, matrix=covariance.matrix * (1 + 1e-6))
    assert changed.fingerprint != covariance.fingerprint


def rewrite(path: Path, change=lambda matrix: matrix, **metadata) -> None:
    """The file again, with other values under the old fingerprint, or other metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = file.metadata()
    new = old | {f"perfusion.{name}": value for name, value in metadata.items()}
    save_file({"covariance": change(load_file(path)["covariance"]).contiguous()}, path, {k: v for k, v in new.items() if v})


def asymmetric(matrix):
    matrix[0, 1] += 1
    return matrix


@pytest.mark.parametrize(
    "change, metadata, message",
    [
        (lambda m: m * 1.001, {}, "its values have fingerprint [0-9a-f]{16}, not [0-9a-f]{16}"),
        (lambda m: m[:8], {}, r"its shape is \[8, 16\], not \[D, D\]"),
        (lambda m: m.float(), {}, "its dtype is torch.float32"),
        (lambda m: m / 0, {}, "must be finite"),
        (asymmetric, {}, "must be symmetric"),
        (lambda m: m - m.diagonal().mean() * torch.eye(16), {}, "must be positive definite"),
        (lambda m: m, {"tokens": ""}, "bad metadata: 'tokens'"),
        (lambda m: m, {"tokens": "many"}, "bad metadata: .*'many'"),
        (lambda m: m, {"format": ""}, "its format is None, not 'covariance-1'"),
        (lambda m: m, {"format": "covariance-9"}, "its format is 'covariance-9'"),
    ],
)
def test_load_checks_everything(saved, change, metadata, message):
    rewrite(saved, change, **metadata)
    with pytest.raises(CovarianceError, match=message) as refusal:
        Covariance.load(saved)
    assert str(saved) in str(refusal.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * 4000])
def test_damaged_files_are_refused(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(CovarianceError, match="is damaged"):
        Covariance.load(saved)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        Covariance.load(tmp_path / "nowhere.safetensors")
