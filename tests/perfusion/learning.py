"""What the tests of training share: pictures, a covariance, short runs, and everything of a pipeline that a run could change.

concept = learn(tiny_sd(), write_pictures(tmp_path / "pictures"), output=tmp_path / "out")
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perfusion.base import denoiser, text_encoder_fingerprint
from perfusion.captions import everyday_captions
from perfusion.concept import Concept
from perfusion.covariance import Covariance, compute_covariance
from perfusion.training import TrainingConfig, train
from tests.perfusion.editing import hooks_of

NAME, SUPERCLASS = "mine", "teddy"
SHORT = dict(steps=4, batch_size=3, checkpoint_every=0, validation_every=0, tensorboard=False)
train_module = sys.modules["perfusion.training.train"]  # the package's attribute of that name is the function


def write_pictures(folder: Path, count: int = 4, *, mask: bool = False) -> Path:
    """Colourful PNGs of 20 x 24 pixels, with masks if wanted."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        small = torch.rand(4, 4, 3, generator=generator)
        Image.fromarray((small * 255).byte().numpy()).resize((20, 24)).save(folder / f"{number}.png")
        if mask:
            Image.fromarray((small[..., 0] * 255).byte().numpy()).resize((20, 24)).save(folder / f"{number}-masklabel.png")
    return folder


_COVARIANCES: dict[str, Covariance] = {}


def covariance_of(pipe: Any) -> Covariance:
    """From a few captions, once per text encoder."""
    fingerprint = text_encoder_fingerprint(pipe)
    if fingerprint not in _COVARIANCES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few captions, so it is shrunk
            _COVARIANCES[fingerprint] = compute_covariance(pipe, list(everyday_captions(64)), progress=False, max_condition=1e4)
    return _COVARIANCES[fingerprint]


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"superclass": SUPERCLASS, "name": NAME, **SHORT, **changes})


def learn(pipe: Any, images: Any, **options: Any) -> Concept:
    """A short run."""
    options = {"superclass": SUPERCLASS, "name": NAME, "covariance": covariance_of(pipe), "progress": False, **SHORT, **options}
    return train(pipe, images, **options)


def same(one: Concept, other: Concept) -> bool:
    """Whether two concepts are equal in every bit that was learned."""
    pairs = zip(
        [*one._single_tensors().values(), *one.word_embeddings], [*other._single_tensors().values(), *other.word_embeddings], strict=True
    )
    return all(torch.equal(a, b) for a, b in pairs)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log's lines, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "memory_mb")} for line in lines]


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that a training could change, weights by value."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "attributes": {
            key: dict(value) if isinstance(value, dict) else id(value) for key, value in vars(pipe).items() if not _left_over(value)
        },
        "hooks": {name: hooks_of(model) for name, model in models.items()},
        "modes": {name: [module.training for module in model.modules()] for name, model in models.items()},
        "required": {name: [parameter.requires_grad for parameter in model.parameters()] for name, model in models.items()},
        "gradients": {name: [parameter.grad for parameter in model.parameters()] for name, model in models.items()},
        "checkpointing": denoiser(pipe).is_gradient_checkpointing,
        "dtypes": {name: model.dtype for name, model in models.items()},
        "timesteps": pipe.scheduler.timesteps.tolist(),
        "vocabulary": len(pipe.tokenizer),
        "weights": {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()},
    }


def _left_over(value: Any) -> bool:
    """Every call of a pipeline leaves its number of steps and the like behind."""
    return value is None or isinstance(value, (int, float))


def assert_unchanged(pipe: Any, before: dict[str, Any]) -> None:
    after = snapshot(pipe)
    for name, weights in before.pop("weights").items():
        assert all(torch.equal(weights[key], value) for key, value in after["weights"][name].items()), name
    for key, value in before.items():
        assert after[key] == value, key
