"""What may stand in a toybox picture: scenes of instances, sampled with more detail than a caption can name.

An *instance* is one particular thing: its class and the continuous attributes in `ATTRIBUTES`. Captions name its class
and, sometimes, its colour word and pattern word; everything else about it is what a concept has to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .shapes import rim
from .words import COLOURS, CONTAINERS, FRAMES, HUE_SPREAD, OBJECTS, PATTERNS, RELATIONS, SCENES, SIZES, STYLE_FRAMES, STYLES

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
    `size` [B] int64 is the size word of a lone thing.
    """

    first: Instances
    second: Instances
    scene: Tensor
    relation: Tensor
    style: Tensor
    details: Tensor
    poses: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.scene)

    def take(self, rows: Tensor) -> Pictures:
        fields = {name: getattr(self, name)[rows] for name in ("scene", "relation", "style", "details", "poses", "size")}
        return Pictures(self.first.take(rows), self.second.take(rows), **fields)


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
    # the second colour stays clear of the main hue; the pattern's is white or nearly so, to be seen on every colour
    second_hue = hue + _uniform(count, 0.2, 0.8, generator)
    pattern_hue = hue + _uniform(count, 0.25, 0.75, generator)
    pale = torch.rand(count, generator=generator) < 0.5
    attributes = torch.stack(
        [
            hue % 1, saturation, brightness,
            second_hue % 1, _uniform(count, 0.25, 0.95, generator), _uniform(count, 0.35, 1.0, generator),
            pattern_hue % 1, torch.where(pale, 0.06, _uniform(count, 0.10, 0.40, generator)), _uniform(count, 0.93, 1.0, generator),
            _uniform(count, 0.42, 0.54, generator), _uniform(count, 0.48, 0.72, generator),
            *_uniform((4, count), 0, 1, generator),
        ],
        dim=1,
    )  # fmt: skip
    return Instances(classes, colour, pattern, attributes)


def sample_poses(relation: Tensor, second: Instances, size: Tensor, generator: torch.Generator) -> Tensor:
    """Place the things by their relation: poses [B, 2, 4]. What stands in a container is hidden below its rim."""
    count = len(relation)

    def around(x: float, y: float, half: float, dx: float, dy: float, spread: float, turn: float) -> Tensor:
        columns = [(x, dx), (y, dy), (half, spread), (0.0, turn)]
        return torch.stack([_uniform(count, middle - by, middle + by, generator) for middle, by in columns], dim=1)

    alone = torch.stack([around(0, 0.08, 0.80, 0.08, 0.05, 0.05, 0.07), around(0, 0.12, 0.7, 0, 0, 0, 0)], dim=1)
    alone[:, 0, 2] *= torch.tensor([1.0, 0.60, 1.22])[size]
    alone[:, 0, 1] += torch.tensor([0.0, 0.24, 0.0])[size]  # small things stand on the ground, too
    inside = torch.stack([around(0, 0, 0.50, 0.05, 0.02, 0.03, 0.07), around(0, 0.34, 0.62, 0.08, 0.04, 0.03, 0.03)], dim=1)
    inside[:, 0, 0] += inside[:, 1, 0]
    rims = torch.zeros(count)
    for word in CONTAINERS:
        rims = torch.where(second.object_class == OBJECTS.index(word), rim(word, second.attributes[:, 11:15]), rims)
    inside[:, 0, 1] += inside[:, 1, 1] + inside[:, 1, 2] * rims - inside[:, 0, 2] * 0.35
    on_top = torch.stack([around(0, 0, 0.46, 0.06, 0.01, 0.03, 0.06), around(0, 0.43, 0.54, 0.10, 0.03, 0.03, 0.03)], dim=1)
    on_top[:, 0, 0] += on_top[:, 1, 0]
    on_top[:, 0, 1] += on_top[:, 1, 1] - on_top[:, 1, 2] * 0.62 - on_top[:, 0, 2] * 0.92
    beside = torch.stack([around(-0.49, 0.20, 0.50, 0.03, 0.06, 0.03, 0.07), around(0.49, 0.20, 0.50, 0.03, 0.06, 0.03, 0.07)], dim=1)
    return torch.stack([alone, inside, on_top, beside])[relation, torch.arange(count)]


def sample_pictures(
    count: int,
    generator: torch.Generator,
    *,
    pairs: float = 0.4,
    styled: float = 0.16,
    sized: float = 0.2,
    first: Instances | None = None,
    second: Instances | None = None,
    scene: Tensor | None = None,
    relation: Tensor | None = None,
    style: Tensor | None = None,
    size: Tensor | None = None,
) -> Pictures:
    """Draw `count` pictures; whatever is given by keyword is kept instead of drawn.

    `pairs`, `styled` and `sized` are the shares of pictures with two things, in another style than "photo", and of lone
    things of another size than the usual. A thing that has to stand
    *in* something that cannot hold it stands next to it.
    """
    drawn_first = sample_instances(count, generator)
    drawn_second = sample_instances(count, generator)
    paired = torch.rand(count, generator=generator) < pairs
    drawn_relation = torch.where(paired, 1 + _choice(len(RELATIONS) - 1, count, generator), 0)
    drawn_scene = _choice(len(SCENES), count, generator)
    drawn_style = torch.where(torch.rand(count, generator=generator) < styled, 1 + _choice(len(STYLES) - 1, count, generator), 0)
    drawn_size = torch.where(torch.rand(count, generator=generator) < sized, 1 + _choice(len(SIZES) - 1, count, generator), 0)
    details = torch.rand((count, SCENE_DETAILS), generator=generator)
    first, second = first or drawn_first, second or drawn_second
    relation = drawn_relation if relation is None else relation
    holds = torch.isin(second.object_class, torch.tensor([OBJECTS.index(word) for word in CONTAINERS]))
    relation = torch.where((relation == 1) & ~holds, 3, relation)
    size = torch.where(relation == 0, drawn_size if size is None else size, 0)
    poses = sample_poses(relation, second, size, generator)
    scene, style = drawn_scene if scene is None else scene, drawn_style if style is None else style
    return Pictures(first, second, scene, relation, style, details, poses, size)


def repeat_instance(instances: Instances, row: int, count: int) -> Instances:
    """The same thing `count` times."""
    return instances.take(torch.full((count,), row))


def plainly(pictures: Pictures) -> Pictures:
    """The same pictures in the photo style."""
    return replace(pictures, style=torch.zeros_like(pictures.style))


def with_article(frame: str, noun: str) -> str:
    """Fill "… a {}" in, as "… an {}" before a vowel."""
    if noun[0] in "aeiou":
        frame = frame.replace(" a {}", " an {}").replace("a {}", "an {}", frame.startswith("a {}"))
    return frame.format(noun)


@dataclass
class Phrase:
    """A thing as a caption words it: indices into `words`, 0 for a size or a pattern and None for a colour that is not said."""

    object_class: int
    colour: int | None = None
    pattern: int = 0
    size: int = 0

    def words(self) -> list[str]:
        """Size, colour, pattern, noun."""
        said = [SIZES[self.size]] if self.size else []
        said += [] if self.colour is None else [list(COLOURS)[self.colour]]
        return said + ([PATTERNS[self.pattern]] if self.pattern else []) + [OBJECTS[self.object_class]]


def caption(pictures: Pictures, generator: torch.Generator, *, named: float = 0.75) -> list[str]:
    """One caption a picture. Colour words are said with probability `named`, patterns and sizes always, the scene nearly always."""
    captions, scenes = [], list(SCENES.values())
    draws = torch.rand((len(pictures), 5), generator=generator).tolist()
    things = [list(zip(*(field.tolist() for field in (t.object_class, t.colour, t.pattern)))) for t in (pictures.first, pictures.second)]
    rest = zip(*(field.tolist() for field in (pictures.relation, pictures.style, pictures.scene, pictures.size)))
    for first, second, (relation, style, scene, size), draw in zip(*things, rest, draws):
        phrases = [
            " ".join(Phrase(kind, colour if share < named else None, pattern, scale).words())
            for (kind, colour, pattern), share, scale in ((first, draw[0], size), (second, draw[1], 0))
        ]
        text = phrases[0]
        if relation:
            text += with_article(f" {RELATIONS[relation]} a {{}}", phrases[1])
        frame = STYLE_FRAMES[STYLES[style]] if style else FRAMES[int(draw[2] * len(FRAMES))]
        text = with_article(frame, text)
        if draw[3] < 0.92:
            text = f"{scenes[scene]} {text}" if draw[4] < 0.12 else f"{text} {scenes[scene]}"
        captions.append(text)
    return captions
