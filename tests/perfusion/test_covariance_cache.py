"""How a covariance is found again: in the cache, beside the model, and by what it was computed from."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest
import torch

from perfusion.captions import everyday_captions
from perfusion.covariance import cache_folder, get_covariance
from tests.perfusion.covariances import compute, trained_sd


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


@pytest.fixture
def computed(monkeypatch):
    """Sources of the covariances that were really computed, in order."""
    import perfusion.covariance.finding as module

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
    monkeypatch.setattr("perfusion.covariance.finding.EVERYDAY_COUNT", 120)
    folder = tmp_path / "model"
    compute(trained_sd(seed=1), captions).save(folder / "covariance.safetensors")
    with pytest.warns(UserWarning, match="computing the covariance anew: .* is of text encoder"):
        covariance = get(sd, model_folder=folder)
    assert covariance.source == "everyday-120-seed0"


def test_one_shrunk_for_another_limit_is_not_taken(sd, captions, monkeypatch, tmp_path):
    monkeypatch.setattr("perfusion.covariance.finding.EVERYDAY_COUNT", 120)
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
    monkeypatch.setenv("PERFUSION_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere/covariance")
    monkeypatch.delenv("PERFUSION_CACHE")
    assert cache_folder() == Path(platformdirs.user_cache_dir("perfusion", appauthor=False)) / "covariance"
