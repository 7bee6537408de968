"""What may stand in a toybox picture: scenes of instances, sampled with more detail than a caption can name.

An *instance* is one particular thing: its class and the continuous attributes in `ATTRIBUTES`. Captions name its class
and, sometimes, its colour word and pattern word; everything else about it is what a concept has to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .shapes import rim
from .words import COLOURS, CONTAINERS, FRAMES, HUE_SPREAD, OBJECTS, PATTERNS, RELATIONS, SCENES, SKETCH_FRAMES

ATTRIBUTES = (
    "hue", "saturation", "brightness",  # main colour
    "second_hue", "second_saturation", "second_brightness",  # the parts no caption names
    "pattern_hue", "pattern_saturation", "pattern_brightness",
    "pattern_pitch", "pattern_angle",
    "proportion_0", "proportion_1", "proportion_2", "proportion_3",
)  # fmt: skip
SCENE_DETAILS = 32


@dataclass
class Instances:
    """n things: `object_class`, `colour`, `pattern` [n] int64 indices into `words`; `attributes` [n, 15] float32."""

    object_class: Tensor
    colour: Tensor
    pattern: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return len(self.object_class)

    def take(self, rows: Tensor) -> Instances:
        return Instances(self.object_class[rows], self.colour[rows], self.pattern[rows], self.attributes[rows])


@dataclass
class Pictures:
    """B pictures: a first thing, where `relation > 0` a second one, a scene and a style.

    `first`, `second`: Instances of length B; `scene`, `relation`, `style` [B] int64; `details` [B, 32] in [0, 1] moves
    what the scene is made of; `poses` [B, 2, 4] are centre x, centre y, half size (in half pictures) and angle (radians);
    `mirrored` [B, 2] bool.
    """

    first: Instances
    second: Instances
    scene: Tensor
    relation: Tensor
    style: Tensor
    details: Tensor
    poses: Tensor
    mirrored: Tensor

    def __len__(self) -> int:
        return len(self.scene)


def _uniform(shape, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _choice(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (size,), generator=generator)


def sample_instances(count: int, generator: torch.Generator, object_class: str | None = None) -> Instances:
    """Draw `count` instances; of one class where `object_class` names it."""
    classes = _choice(len(OBJECTS), count, generator)
    if object_class is not None:
        classes = torch.full((count,), OBJECTS.index(object_class))
    colour = _choice(len(COLOURS), count, generator)
    pattern = torch.where(torch.rand(count, generator=generator) < 0.28, 0, 1 + _choice(len(PATTERNS) - 1, count, generator))
    table = torch.tensor([(hue, *saturation, *brightness) for hue, saturation, brightness in COLOURS.values()])[colour]
    hue = (table[:, 0] + _uniform(count, -HUE_SPREAD, HUE_SPREAD, generator)) / 360
    saturation = table[:, 1] + (table[:, 2] - table[:, 1]) * torch.rand(count, generator=generator)
    brightness = table[:, 3] + (table[:, 4] - table[:, 3]) * torch.rand(count, generator=generator)
    # the other two colours stay clear of the main hue, or are close to white or to black
    second_hue = hue + _uniform(count, 0.2, 0.8, generator)
    pattern_hue = hue + _uniform(count, 0.25, 0.75, generator)
    whitish = torch.rand(count, generator=generator) < 0.4
    attributes = torch.stack(
        [
            hue % 1, saturation, brightness,
            second_hue % 1, _uniform(count, 0.25, 0.95, generator), _uniform(count, 0.35, 1.0, generator),
            pattern_hue % 1, torch.where(whitish, 0.06, _uniform(count, 0.5, 0.95, generator)),
            torch.where(whitish, 0.97, _uniform(count, 0.25, 1.0, generator)),
            _uniform(count, 0.30, 0.60, generator), _uniform(count, 0, torch.pi, generator),
            *_uniform((4, count), 0, 1, generator),
        ],
        dim=1,
    )  # fmt: skip
    return Instances(classes, colour, pattern, attributes)


def sample_poses(relation: Tensor, second: Instances, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Place the things by their relation: poses [B, 2, 4] and mirrored [B, 2]. What stands in a container is hidden below its rim."""
    count = len(relation)

    def around(x: float, y: float, size: float, dx: float, dy: float, spread: float, turn: float) -> Tensor:
        columns = [(x, dx), (y, dy), (size, spread), (0.0, turn)]
        return torch.stack([_uniform(count, middle - by, middle + by, generator) for middle, by in columns], dim=1)

    alone = torch.stack([around(0, 0.12, 0.70, 0.18, 0.08, 0.09, 0.16), around(0, 0.12, 0.7, 0, 0, 0, 0)], dim=1)
    inside = torch.stack([around(0, 0, 0.42, 0.05, 0.02, 0.03, 0.10), around(0, 0.38, 0.56, 0.12, 0.05, 0.04, 0.03)], dim=1)
    inside[:, 0, 0] += inside[:, 1, 0]
    rims = torch.zeros(count)
    for word in CONTAINERS:
        rims = torch.where(second.object_class == OBJECTS.index(word), rim(word, second.attributes[:, 11:15]), rims)
    inside[:, 0, 1] += inside[:, 1, 1] + inside[:, 1, 2] * rims - inside[:, 0, 2] * 0.25
    on_top = torch.stack([around(0, 0, 0.37, 0.06, 0.01, 0.03, 0.06), around(0, 0.50, 0.46, 0.16, 0.04, 0.03, 0.03)], dim=1)
    on_top[:, 0, 0] += on_top[:, 1, 0]
    on_top[:, 0, 1] += on_top[:, 1, 1] - on_top[:, 1, 2] * 0.62 - on_top[:, 0, 2] * 0.92
    beside = torch.stack([around(-0.47, 0.26, 0.44, 0.04, 0.08, 0.04, 0.10), around(0.47, 0.26, 0.44, 0.04, 0.08, 0.04, 0.10)], dim=1)
    poses = torch.stack([alone, inside, on_top, beside])[relation, torch.arange(count)]
    return poses, torch.rand((count, 2), generator=generator) < 0.5


def sample_pictures(
    count: int,
    generator: torch.Generator,
    *,
    pairs: float = 0.4,
    sketches: float = 0.08,
    first: Instances | None = None,
    second: Instances | None = None,
    scene: Tensor | None = None,
    relation: Tensor | None = None,
) -> Pictures:
    """Draw `count` pictures; whatever is given by keyword is kept instead of drawn.

    `pairs` and `sketches` are the shares of pictures with two things and in the sketch style. A thing that has to stand
    *in* something that cannot hold it stands next to it.
    """
    drawn_first = sample_instances(count, generator)
    drawn_second = sample_instances(count, generator)
    paired = torch.rand(count, generator=generator) < pairs
    drawn_relation = torch.where(paired, 1 + _choice(len(RELATIONS) - 1, count, generator), 0)
    drawn_scene = _choice(len(SCENES), count, generator)
    style = (torch.rand(count, generator=generator) < sketches).long()
    details = torch.rand((count, SCENE_DETAILS), generator=generator)
    first, second = first or drawn_first, second or drawn_second
    relation = drawn_relation if relation is None else relation
    holds = torch.isin(second.object_class, torch.tensor([OBJECTS.index(word) for word in CONTAINERS]))
    relation = torch.where((relation == 1) & ~holds, 3, relation)
    poses, mirrored = sample_poses(relation, second, generator)
    return Pictures(first, second, drawn_scene if scene is None else scene, relation, style, details, poses, mirrored)


def repeat_instance(instances: Instances, row: int, count: int) -> Instances:
    """The same thing `count` times."""
    return instances.take(torch.full((count,), row))


def without_style(pictures: Pictures) -> Pictures:
    return replace(pictures, style=torch.zeros_like(pictures.style))


def _noun(instances: Instances, row: int, named: Tensor) -> str:
    words = [OBJECTS[instances.object_class[row]]]
    if named[1] and instances.pattern[row] > 0:
        words.insert(0, PATTERNS[instances.pattern[row]])
    if named[0]:
        words.insert(0, list(COLOURS)[instances.colour[row]])
    return " ".join(words)


def with_article(frame: str, noun: str) -> str:
    """Fill "… a {}" in, as "… an {}" before a vowel."""
    if noun[0] in "aeiou":
        frame = frame.replace(" a {}", " an {}").replace("a {}", "an {}", frame.startswith("a {}"))
    return frame.format(noun)


def caption(pictures: Pictures, generator: torch.Generator, *, named: float = 0.7) -> list[str]:
    """One caption a picture. Colour and pattern words are said with probability `named`, the scene nearly always."""
    captions = []
    phrases = list(SCENES.values())
    for row in range(len(pictures)):
        said = torch.rand((2, 2), generator=generator) < named
        draws = torch.rand(3, generator=generator)
        text = _noun(pictures.first, row, said[0])
        if relation := int(pictures.relation[row]):
            text += with_article(f" {RELATIONS[relation]} a {{}}", _noun(pictures.second, row, said[1]))
        frames = SKETCH_FRAMES if pictures.style[row] else FRAMES
        text = with_article(frames[int(draws[0] * len(frames))], text)
        phrase = phrases[pictures.scene[row]]
        if draws[1] < 0.92:
            text = f"{phrase} {text}" if draws[2] < 0.12 else f"{text} {phrase}"
        captions.append(text)
    return captions
