"""The second moment of encodings: what it counts, what it says about itself, and how it is found again."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perfusion.captions import everyday_captions
from perfusion.covariance import Covariance, CovarianceError, cache_folder, compute_covariance, get_covariance
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

FEW = ["a photo of a red cat", "teapot", "a dog and a cat on the beach at night, painting", "", "zyx armadillo"]


@pytest.fixture(scope="module")
def captions():
    return list(everyday_captions(120))


def final_norm(encoder) -> torch.nn.LayerNorm:
    return next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))


def trained_sd(dtype=torch.float64, seed=0):
    """A tiny pipeline whose last layer norm is not the identity.

    With scale 1 and bias 0, as initialised, every encoding sums to 0 and C is singular whatever the captions say.
    """
    pipe = tiny_sd(seed=seed)
    norm, generator = final_norm(pipe.text_encoder), torch.Generator().manual_seed(seed)
    norm.weight.copy_(1 + 0.3 * torch.randn(16, generator=generator))
    norm.bias.copy_(0.5 * torch.randn(16, generator=generator))
    return pipe.to(dtype)


@pytest.fixture(scope="module")
def sd():
    return trained_sd()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERFUSION_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def compute(pipe, captions, **options):
    return compute_covariance(pipe, captions, **{"progress": False, **options})


def brute_force(pipe, captions) -> tuple[torch.Tensor, int]:
    """One caption at a time, one token at a time: start, words and the first end; the layers diffusers' UNet reads."""
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
        rows += list(torch.cat(parts, 1))
    moment = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64)
    for row in rows:
        moment += torch.outer(row.double(), row.double())
    return moment / len(rows), len(rows)


# ---- what is counted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [trained_sd, tiny_sdxl])
def test_equals_a_loop_over_real_tokens(make, captions):
    """SDXL: the penultimate hidden layers of both encoders, side by side, and its second tokenizer pads with "!"."""
    pipe = make(dtype=torch.float64)
    covariance = compute(pipe, captions)
    expected, tokens = brute_force(pipe, captions)
    assert covariance.matrix.dtype == torch.float64 and covariance.width == expected.shape[0]
    assert (covariance.captions, covariance.tokens, covariance.shrinkage) == (120, tokens, 0)
    torch.testing.assert_close(covariance.matrix, expected, rtol=1e-12, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(expected)
    condition = (eigenvalues[-1] / eigenvalues[0]).item()
    assert covariance.condition == covariance.condition_before == pytest.approx(condition, rel=1e-6)


@pytest.mark.filterwarnings("ignore:the covariance of:UserWarning")
def test_padding_is_not_counted(sd):
    assert compute(sd, ["red cat"]).tokens == 4
    assert compute(sd, FEW).tokens == brute_force(sd, FEW)[1]


def test_a_truncated_caption_counts_77_tokens_and_diffusers_does_not_complain(sd, captions, caplog):
    long = "red cat " * 60
    with caplog.at_level(logging.WARNING):
        covariance = compute(sd, [long, *captions])
    assert covariance.tokens == compute(sd, captions).tokens + 77
    assert "truncated" not in caplog.text
    sd.encode_prompt(long, "cpu", 1, False)
    assert "truncated" in caplog.text, "the pipeline's own warning must come back afterwards"


@pytest.mark.parametrize("batch_size", [1, 7, 120, 1000])
def test_batch_size_does_not_matter(sd, captions, batch_size):
    expected = compute(sd, captions)
    covariance = compute(sd, iter(captions), batch_size=batch_size)
    torch.testing.assert_close(covariance.matrix, expected.matrix, rtol=1e-12, atol=1e-12)
    assert (covariance.tokens, covariance.source) == (expected.tokens, expected.source)


def test_half_precision_encoders_are_summed_in_float64(captions):
    """What remains is the rounding of single encodings. Sums in float16 stop growing at 2048 times a term."""
    half, full = compute(trained_sd(torch.float16), captions), compute(trained_sd(torch.float32), captions)
    assert half.matrix.dtype == torch.float64
    assert (half.matrix - full.matrix).norm() < 1e-3 * full.matrix.norm()


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


def test_too_few_captions_are_shrunk_and_say_so(sd):
    few = ["red cat", "blue dog"]  # 8 tokens, of which 4 are distinct, for 16 dimensions
    with pytest.warns(UserWarning, match=r"condition number .*, above 1\.0e\+03; 8 tokens are few for 16 dimensions: shrunk by"):
        covariance = compute(sd, few, max_condition=1e3)
    raw, _ = brute_force(sd, few)
    assert covariance.condition_before > 1e12 and covariance.condition == pytest.approx(1e3, rel=1e-6)
    weight = covariance.shrinkage
    assert 0 < weight < 1
    expected = (1 - weight) * raw + weight * raw.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(covariance.matrix, expected)


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


def test_metric_targets(sd, captions):
    covariance = compute(sd, captions)
    targets = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric = covariance.metric_targets(targets)
    torch.testing.assert_close(metric @ covariance.matrix, targets, rtol=1e-6, atol=1e-6)
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


# ---- finding again ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Sources of the covariances that were really computed, in order."""
    import perfusion.covariance as module

    sources, original = [], module.compute_covariance

    def counting(pipe, captions, **options):
        sources.append(options["source"])
        return original(pipe, captions, **options)

    monkeypatch.setattr(module, "compute_covariance", counting)
    return sources


def get(pipe, captions=None, **options):
    return get_covariance(pipe, captions, **{"progress": False, **options})


def test_cache_hit_and_miss(sd, computed, home):
    first = get(sd, count=120)
    again = get(trained_sd(), count=120)
    assert computed == ["everyday-120-seed0"] and torch.equal(first.matrix, again.matrix)
    assert first.path == again.path and first.path.parent == home / "covariance"
    other = get(trained_sd(seed=1), count=120)
    assert len(computed) == 2 and not torch.equal(first.matrix, other.matrix)
    get(sd, count=121)
    get(sd, count=120, max_condition=1e5)
    assert len(computed) == 4 and len(list(first.path.parent.iterdir())) == 4


def test_a_caption_file_is_known_by_its_content(sd, captions, computed, tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("\n".join(captions), encoding="utf-8")
    from_file = get(sd, path)
    get(sd, str(path.rename(tmp_path / "renamed.txt")))
    assert len(computed) == 1 and from_file.source.startswith("file-") and from_file.captions == 120
    get(sd, tmp_path / "renamed.txt", count=100)
    (tmp_path / "renamed.txt").write_text("\n".join([*captions, "one more"]), encoding="utf-8")
    get(sd, tmp_path / "renamed.txt")
    assert computed == [from_file.source, from_file.source + "-first100", computed[2]] and computed[2] != from_file.source


def test_a_list_of_captions_has_the_same_name_however_it_is_computed(sd, captions, computed):
    assert get(sd, iter(captions)).source == compute(sd, captions).source == computed[0]
    get(sd, captions)
    assert len(computed) == 1


def test_a_damaged_cache_is_reported_and_replaced(sd, computed):
    first = get(sd, count=120)
    first.path.write_bytes(first.path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="computing the covariance anew: .* is damaged"):
        second = get(sd, count=120)
    assert len(computed) == 2 and torch.equal(second.matrix, first.matrix)
    get(sd, count=120)
    assert len(computed) == 2


def test_an_interrupt_leaves_nothing_behind(sd, captions, home):
    """Clean abort: no partial sum may ever be taken for a covariance."""

    def interrupted():
        yield from captions[:100]
        raise KeyboardInterrupt

    path = home / "covariance"
    with pytest.raises(KeyboardInterrupt):
        compute(sd, interrupted(), batch_size=10)
    assert not path.exists()


def test_a_covariance_beside_the_model(sd, captions, computed, tmp_path):
    shipped = compute(sd, captions, source="its own captions").save(tmp_path / "model" / "covariance.safetensors")
    sd.save_pretrained(shipped.path.parent)
    pipe = type(sd).from_pretrained(shipped.path.parent, dtype=torch.float32)
    found = get(pipe)
    assert not computed and found.path == shipped.path and found.source == "its own captions"
    assert get(sd, model_folder=shipped.path.parent).path == shipped.path
    assert get(sd, model_folder=shipped.path.parent, max_condition=1.01 * shipped.condition).path == shipped.path
    get(pipe, captions)
    assert len(computed) == 1, "captions that the user names go before what is shipped"


def test_a_covariance_of_another_model_is_not_taken(sd, captions, monkeypatch, tmp_path):
    monkeypatch.setattr("perfusion.covariance.EVERYDAY_COUNT", 120)
    folder = tmp_path / "model"
    compute(trained_sd(seed=1), captions).save(folder / "covariance.safetensors")
    with pytest.warns(UserWarning, match="computing the covariance anew: .* is of text encoder"):
        covariance = get(sd, model_folder=folder)
    assert covariance.source == "everyday-120-seed0"


def test_one_shrunk_for_another_limit_is_not_taken(sd, captions, monkeypatch, tmp_path):
    monkeypatch.setattr("perfusion.covariance.EVERYDAY_COUNT", 120)
    folder = tmp_path / "model"
    with pytest.warns(UserWarning, match="shrunk by"):
        compute(sd, captions, max_condition=2).save(folder / "covariance.safetensors")
    with pytest.warns(UserWarning, match=r"was limited to condition 2, not 1e\+06"):
        covariance = get(sd, model_folder=folder)
    assert covariance.shrinkage == 0


def test_a_cache_that_cannot_be_written_costs_nothing(sd, captions, home):
    home.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be cached"):
        covariance = get(sd, captions)
    assert covariance.path is None and covariance.captions == 120


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("PERFUSION_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/covariance")
    monkeypatch.delenv("PERFUSION_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/perfusion/covariance")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/perfusion/covariance"


# ---- the command --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Runs `perfusion covariance` on a tiny pipeline: (arguments) -> typer's result."""
    import sys
    import types

    from typer.testing import CliRunner

    from perfusion import cli

    def load_pipeline(model, **_):
        if model == "nowhere":
            raise FileNotFoundError(f"no such model: {model}")
        pipe = tiny_sd() if model == "young" else trained_sd()
        if model == "headless":
            pipe.text_encoder = None
        return pipe

    monkeypatch.setitem(sys.modules, "perfusion.models", types.SimpleNamespace(load_pipeline=load_pipeline))
    return lambda *arguments: CliRunner().invoke(cli.app, ["covariance", *map(str, arguments)], prog_name="perfusion")


def test_command(command, tmp_path):
    result = command("--model", "trained", "--count", 200, "--output", tmp_path / "c.safetensors")
    assert result.exit_code == 0, result.output
    written = Covariance.load(tmp_path / "c.safetensors")
    assert f"{written.fingerprint}, 16 x 16, of trained" in result.stdout and str(written.path) in result.stdout
    assert "200 (" in result.stdout and "everyday-200-seed0" in result.stdout and "shrinkage    none" in result.stdout
    command("--count", 200, "--output", tmp_path)
    assert Covariance.load(tmp_path / "covariance.safetensors").fingerprint == written.fingerprint


def test_command_json_and_shrinkage(command):
    result = command("--model", "young", "--count", 200, "--json")
    facts = json.loads(result.stdout)
    assert 0 < facts["shrinkage"] < 1e-4 and facts["condition"] == pytest.approx(1e6, rel=1e-3)
    assert Covariance.load(facts["file"]).fingerprint == facts["fingerprint"]
    assert "warning: the covariance of everyday-200-seed0 has condition number" in result.stderr
    facts = json.loads(command("--model", "young", "--count", 200, "--max-condition", 1e5, "--json").stdout)
    assert facts["condition"] == pytest.approx(1e5, rel=1e-3) and facts["max_condition"] == 1e5


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--model", "nowhere"], 2, "error: no such model: nowhere"),
        (["--captions", "nowhere.txt"], 2, "error: no such file of captions: nowhere.txt\n"),
        (["--max-condition", "0"], 2, "error: --max-condition must be above 1 and at most 1e12, got 0\n"),
        (["--max-condition", "nan"], 2, "error: --max-condition must be"),
        (["--device", "nonsense"], 2, "error: --device nonsense cannot be used: "),
        (["--device", "meta"], 2, "error: --device meta cannot be used: "),
        (["--count", "0"], 2, "--count"),
        (["--model", "headless"], 3, "has no text encoder"),
    ],
)
def test_command_refuses(command, arguments, code, message):
    result = command(*arguments)
    assert result.exit_code == code and message in result.stderr
    assert result.stderr.count("\n") == 1 or "Usage" in result.stderr


@pytest.mark.parametrize("as_a_folder", [False, True])
def test_command_never_replaces_a_file_unasked(command, tmp_path, as_a_folder):
    file = tmp_path / "covariance.safetensors"
    file.write_bytes(b"mine")
    arguments = ("--count", 200, "--output", tmp_path if as_a_folder else file)
    refused = command(*arguments)
    assert (refused.exit_code, refused.stdout, file.read_bytes()) == (2, "", b"mine")
    assert refused.stderr == f"error: {file} is there already. Choose another --output, or say --overwrite.\n"
    assert command(*arguments, "--overwrite").exit_code == 0
    assert Covariance.load(file).captions == 200


@pytest.mark.filterwarnings("ignore:the covariance of")
def test_command_says_infinity_as_null(command, monkeypatch):
    import perfusion.covariance

    endless = dataclasses.replace(compute_covariance(trained_sd(), ["a"] * 9, progress=False), condition_before=float("inf"))
    monkeypatch.setattr(perfusion.covariance, "get_covariance", lambda *_, **__: endless)
    facts = json.loads(command("--json").stdout, parse_constant=pytest.fail)
    assert facts["condition_before"] is None and facts["captions"] == 9
