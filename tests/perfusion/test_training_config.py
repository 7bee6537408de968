"""perfusion.training_config: defaults of the method, every rule by its message, and the file."""

import pytest

from perfusion.training_config import TrainingConfig, read_settings

WORDS = dict(superclass="teddy", name="mine")


def test_the_defaults_are_the_recipe():
    config = TrainingConfig(**WORDS)
    assert (config.steps, config.batch_size, config.learning_rate, config.word_learning_rate) == (400, 16, 0.03, 0.006)
    assert (config.bias, config.temperature, config.inference_temperature) == (0.75, 0.1, 0.15)
    assert (config.ema_decay, config.flip, config.key_lock) == (0.9, 0.5, True)
    assert 0.6 <= config.inference_bias <= 0.75


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "many"}, "steps must be of type int, got 'many'"),
        ({"steps": True}, "steps must be of type int, got True"),
        ({"batch_size": 2.5}, "batch_size must be of type int"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"word_learning_rate": float("inf")}, "word_learning_rate must be positive"),
        ({"bias": 3}, "bias must lie between -2 and 2"),
        ({"inference_temperature": 0}, "inference_temperature must lie between"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"key_lock": 1}, "key_lock must be of type bool"),
        ({"resolution": 4}, "resolution must be at least 8 pixels"),
        ({"instance_prompts": ["a teddy"]}, "instance_prompts must hold \"{}\" once, for the concept, got 'a teddy'"),
        ({"instance_prompts": "a {} and a {}"}, 'instance_prompts must hold "{}" once'),
        ({"instance_prompts": [5]}, 'instance_prompts must hold "{}" once'),
        ({"validation_prompts": []}, "validation_prompts must not be empty"),
        ({"validation_prompts": 5}, "validation_prompts must be of type tuple"),
        ({"validation_every": -1}, r"validation_every must be 0 \(never\)"),
        ({"checkpoint_limit": 0}, "checkpoint_limit must be at least 1"),
        ({"seed": -1}, "seed must be a number"),
        ({"superclass": "teddy."}, "superclass must end in a word, as the concept takes the place of its last token, got 'teddy.'"),
        ({"superclass": "bear (toy) "}, "superclass must end in a word"),
        ({"superclass": None}, "superclass must be of type str"),
    ],
)
def test_every_rule_is_said(change, rule):
    with pytest.raises(ValueError, match=f"training: {rule}"):
        TrainingConfig(**{**WORDS, **change})


def test_file_and_back(tmp_path):
    config = TrainingConfig(
        **WORDS, steps=7, resolution=64, instance_prompts="ein {} über allem", validation_prompts=["a {}"], key_lock=False
    )
    config.save(tmp_path / "config.yaml", images=["a.png"], base="a model")
    assert TrainingConfig(**read_settings(tmp_path / "config.yaml")) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_reads_3e_2_as_text(tmp_path):
    (tmp_path / "config.yaml").write_text("superclass: teddy\nname: mine\nlearning_rate: 3e-2\nresolution: null\n")
    config = TrainingConfig(**read_settings(tmp_path / "config.yaml"))
    assert (config.learning_rate, config.resolution) == (0.03, None)
    (tmp_path / "config.yaml").write_text("superclass: teddy\nname: mine\nlearning_rate: much\n")
    with pytest.raises(ValueError, match="learning_rate must be of type float, got 'much'"):
        TrainingConfig(**read_settings(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "is not a YAML file"),
        ("- steps", "must map settings to values"),
        ("", "must map"),
        ("stepz: 3\nnight: 1", "sets night, stepz; known settings are superclass,"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "config.yaml")


def test_only_what_decides_the_vectors_must_last():
    lasting = TrainingConfig(**WORDS).lasting()
    assert lasting == TrainingConfig(**WORDS, steps=9, validation_every=0, author="me", inference_bias=0.5, tensorboard=False).lasting()
    assert all(
        lasting != TrainingConfig(**WORDS, **change).lasting()
        for change in ({"seed": 1}, {"flip": 0}, {"batch_size": 2}, {"key_lock": False})
    )
