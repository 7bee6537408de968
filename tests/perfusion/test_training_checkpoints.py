"""perfusion.training.checkpoints: whole files, a limit, and no continuation of something else."""


import pytest
import torch
from safetensors.torch import save_file

from perfusion.training import checkpoints

FACTS = {"batch_size": 3, "instance_prompts": ("a {}",), "pictures": "0123"}


def tensors(step):
    return {"target": torch.arange(4.0) + step, "adam.step.word.0": torch.tensor(float(step))}


def write(folder, step, limit=2):
    return checkpoints.save(folder, step, FACTS, tensors(step), limit)


def test_what_is_saved_comes_back(tmp_path):
    checkpoint = checkpoints.load(write(tmp_path, 12))
    assert checkpoint.step == 12 and checkpoint.tensors.keys() == tensors(12).keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors(12).items())
    checkpoint.check(FACTS)  # tuples became lists in the file, and are the same setting


def test_the_last_ones_are_kept_by_number(tmp_path):
    (tmp_path / "step-notes.safetensors").write_text("somebody's")
    for step in (999_999, 1_000_000, 1_000_001):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-1000000.safetensors",
        "step-1000001.safetensors",
        "step-notes.safetensors",
    ]
    assert checkpoints.latest(tmp_path).name == "step-1000001.safetensors"
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_other_settings_are_named(tmp_path):
    checkpoint = checkpoints.load(write(tmp_path, 1))
    with pytest.raises(ValueError, match=r"other settings \(batch_size 3 -> 4; pictures '0123' -> 'abcd'\)"):
        checkpoint.check({**FACTS, "batch_size": 4, "pictures": "abcd"})
    with pytest.raises(ValueError, match="seed None -> 1"):
        checkpoint.check({**FACTS, "seed": 1})


def test_damage_is_seen(tmp_path):
    path = write(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit, which safetensors does not notice
    with pytest.raises(ValueError, match="is damaged: its tensors are not the ones that were saved"):
        checkpoints.load(path)
    path.write_text("nothing of the kind")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"), [(None, "is not a training checkpoint"), ({"format": "perfusion-training-1", "step": "x"}, "is damaged")]
)
def test_other_files_are_refused(tmp_path, metadata, message):
    save_file(tensors(1), tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, error):
    path = write(tmp_path, 1)

    def fail(descriptor):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write(tmp_path, 1)
    assert [each.name for each in tmp_path.iterdir()] == [path.name] and checkpoints.load(path).step == 1
