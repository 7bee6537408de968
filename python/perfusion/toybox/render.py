"""The toybox renderer: `Pictures` to anti-aliased, shaded images and exact masks, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import DRAW, box, circle, ellipse, trapezoid
from .words import OBJECTS, SCENES, STYLES
from .world import Instances, Pictures


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours [..., 3] in [0, 1] from hue (turns), saturation and value [...]."""
    sector = hue.unsqueeze(-1) * 6 + torch.tensor([5.0, 3.0, 1.0])
    k = sector % 6
    return value.unsqueeze(-1) * (1 - saturation.unsqueeze(-1) * torch.minimum(k, 4 - k).clamp(0, 1))


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x.unsqueeze(0), y.unsqueeze(0)


class Canvas:
    """Images [B, 3, H, W] on which regions given by signed distances are painted."""

    def __init__(self, colour: Tensor, size: int):
        self.pixel = 2 / size
        self.image = colour.view(-1, 3, 1, 1).expand(-1, 3, size, size).clone()

    def cover(self, distance: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return (0.5 - distance * scale / self.pixel).clamp(0, 1)

    def paint(self, distance: Tensor, colour: Tensor | tuple[float, float, float], opacity: float = 1.0) -> None:
        if not isinstance(colour, Tensor):
            colour = torch.tensor(colour)
        if colour.dim() < 4:
            colour = colour.view(-1, 3, 1, 1)
        self.image = torch.lerp(self.image, colour.expand_as(self.image), opacity * self.cover(distance).unsqueeze(1).expand_as(self.image))


def _mix(first: tuple[float, float, float], second: tuple[float, float, float], amount: Tensor) -> Tensor:
    return torch.lerp(torch.tensor(first), torch.tensor(second), amount.unsqueeze(-1))


def _beach(x, y, d, canvas):
    horizon = -0.25 + 0.3 * d[0]
    canvas.paint(circle(x, y, -0.8 + 1.6 * d[1], -0.72 + 0.2 * d[2], 0.17), (1.0, 0.93, 0.55))
    canvas.paint(horizon - y, (0.16, 0.52, 0.74))
    canvas.paint(horizon + 0.30 + 0.05 * torch.sin(6 * x + 6.28 * d[3]) - y, (0.93, 0.97, 0.97))
    canvas.paint(horizon + 0.36 + 0.05 * torch.sin(6 * x + 6.28 * d[3]) - y, _mix((0.93, 0.83, 0.60), (0.87, 0.76, 0.52), d[4].view(-1)))


def _snow(x, y, d, canvas):
    hill = 0.02 + 0.3 * d[0] + 0.10 * torch.sin(2.5 * x + 6.28 * d[1])
    for k in range(3):
        place, tall = -0.8 + 0.8 * k + 0.3 * d[2 + k], 0.5 + 0.3 * d[5 + k]
        canvas.paint(trapezoid(x, y, place, hill - tall, hill + 0.1, 0.0 * tall, 0.30 * tall), (0.45, 0.58, 0.60))
    canvas.paint(hill - y, (0.95, 0.97, 1.0))
    for k in range(11):
        canvas.paint(circle(x, y, -1 + 2 * d[8 + k], -1 + 2 * d[20 + k], 0.045), (1.0, 1.0, 1.0))


def _forest(x, y, d, canvas):
    canvas.paint(0.25 + 0.2 * d[0] - y, (0.27, 0.40, 0.16))
    for k in range(5):
        place, wide = -0.9 + 0.45 * k + 0.25 * d[1 + k], 0.07 + 0.05 * d[6 + k]
        canvas.paint(box(x, y, place, -0.3, wide, 0.75), (0.36, 0.25, 0.15))
    for k in range(6):
        canvas.paint(circle(x, y, -1 + 0.4 * k + 0.2 * d[11 + k], -1.0 + 0.25 * d[17 + k], 0.30), (0.10, 0.33, 0.13))


def _night(x, y, d, canvas):
    for k in range(10):
        canvas.paint(circle(x, y, -1 + 2 * d[1 + k], -1 + 1.2 * d[12 + k], 0.035), (1.0, 0.98, 0.80))
    place, tall = -0.7 + 1.4 * d[23], -0.65 + 0.2 * d[24]
    canvas.paint(circle(x, y, place, tall, 0.19), (0.96, 0.94, 0.78))
    canvas.paint(circle(x, y, place + 0.09, tall - 0.05, 0.16), (0.06, 0.07, 0.20))
    canvas.paint(0.40 + 0.15 * d[0] + 0.06 * torch.sin(3 * x + 6.28 * d[25]) - y, (0.10, 0.12, 0.14))


def _room(x, y, d, canvas):
    floor, place = 0.30 + 0.2 * d[0], -0.62 + 1.24 * d[1].round() + 0.1 * d[2]
    canvas.paint(box(x, y, place, -0.48, 0.34, 0.36, 0.02), (0.98, 0.98, 0.96))
    canvas.paint(box(x, y, place, -0.48, 0.28, 0.30, 0.02), (0.66, 0.84, 0.95))
    canvas.paint(torch.minimum(box(x, y, place, -0.48, 0.025, 0.3, 0.0), box(x, y, place, -0.48, 0.28, 0.025, 0.0)), (0.98, 0.98, 0.96))
    canvas.paint(floor - y, _mix((0.58, 0.38, 0.22), (0.66, 0.46, 0.28), d[3].view(-1)))
    canvas.paint((y - floor - 0.03).abs() - 0.03, (0.95, 0.93, 0.88))


def _city(x, y, d, canvas):
    for k in range(5):
        place, tall, wide = -0.9 + 0.45 * k + 0.1 * d[1 + k], -0.75 + 0.7 * d[6 + k], 0.17 + 0.06 * d[11 + k]
        canvas.paint(torch.maximum((x - place).abs() - wide, tall - y), _mix((0.38, 0.40, 0.46), (0.56, 0.55, 0.58), d[16 + k].view(-1)))
        windows = torch.maximum(((x - place).abs() - 0.07).abs() - 0.035, ((y - tall) % 0.24 - 0.13).abs() - 0.05)
        canvas.paint(torch.maximum(windows, tall + 0.06 - y), (0.98, 0.90, 0.58))
    street = 0.42 + 0.12 * d[0]
    canvas.paint(street - y, (0.27, 0.28, 0.30))
    canvas.paint(torch.maximum((y - street - 0.24).abs() - 0.03, ((x + 2 * d[21]) % 0.5 - 0.25).abs() - 0.14), (0.92, 0.92, 0.90))


_SKIES = {
    "beach": ((0.50, 0.78, 0.95), (0.66, 0.87, 0.98), _beach),
    "snow": ((0.72, 0.80, 0.88), (0.80, 0.86, 0.93), _snow),
    "forest": ((0.42, 0.60, 0.32), (0.50, 0.66, 0.38), _forest),
    "night": ((0.05, 0.06, 0.18), (0.09, 0.08, 0.25), _night),
    "room": ((0.88, 0.80, 0.66), (0.90, 0.76, 0.70), _room),
    "city": ((0.70, 0.74, 0.80), (0.84, 0.80, 0.76), _city),
}


def _background(scene: Tensor, details: Tensor, size: int) -> Tensor:
    image = torch.empty(len(scene), 3, size, size)
    x, y = _grid(size)
    for index, word in enumerate(SCENES):
        rows = (scene == index).nonzero().flatten()
        if len(rows) == 0:
            continue
        low, high, draw = _SKIES[word]
        columns = [column.view(-1, 1, 1) for column in details[rows].unbind(1)]
        canvas = Canvas(_mix(low, high, details[rows, 31]), size)
        draw(x, y, columns, canvas)
        image[rows] = canvas.image * (1.04 - 0.10 * (y + 1) / 2)
    return image


def _pattern(x: Tensor, y: Tensor, pattern: Tensor, attributes: Tensor, pixel: Tensor) -> Tensor:
    """How much of the pattern's colour lies at each point [B, H, W], in [0, 1]."""
    pitch, angle = attributes[:, 9].view(-1, 1, 1), attributes[:, 10].view(-1, 1, 1)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    def wave(t: Tensor) -> Tensor:  # a triangle wave in units of the pattern's space, 0 on the lines
        return ((t / pitch) % 1 - 0.5).abs() * pitch

    def soft(distance: Tensor) -> Tensor:
        return (0.5 - distance / pixel).clamp(0, 1)

    stripes = soft(wave(u) - 0.19 * pitch)
    dots = soft(torch.sqrt(wave(u) ** 2 + wave(v) ** 2 + 1e-9) - 0.31 * pitch)
    a, b = soft(wave(u * 0.6) - 0.25 * pitch), soft(wave(v * 0.6) - 0.25 * pitch)
    checks = 0.95 * (a + b - 2 * a * b)
    chosen = torch.stack([torch.zeros_like(stripes), stripes, dots, checks])
    return chosen[pattern, torch.arange(len(pattern))]


def _place(
    image: Tensor, things: Instances, poses: Tensor, opened: Tensor, sketched: Tensor, behind: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one thing on every image where `behind`; returns the images and the thing's coverage [B, H, W].

    sketched [B]: pencil has no hues, so that a pattern is black on a light thing and white on a dark one.
    """
    size = image.shape[-1]
    result, coverage = image.clone(), torch.zeros(len(image), size, size)
    x, y = _grid(size)
    for index, word in enumerate(OBJECTS):
        rows = ((things.object_class == index) & behind).nonzero().flatten()
        if len(rows) == 0:
            continue
        cx, cy, half, angle = (column.view(-1, 1, 1) for column in poses[rows].unbind(1))
        px, py = (x - cx) / half, (y - cy) / half
        px, py = px * angle.cos() + py * angle.sin(), py * angle.cos() - px * angle.sin()
        attributes = things.attributes[rows]
        canvas = Canvas(torch.zeros(len(rows), 3), size)
        canvas.image = result[rows]
        shadow = ellipse(x, y, cx, cy + half * 0.98, half * 0.8, half * 0.16)
        canvas.paint(shadow + 0.02, (0.0, 0.0, 0.0), 0.28)
        main = hsv_to_rgb(*attributes[:, 0:3].unbind(1)).view(-1, 3, 1, 1)
        ornament = hsv_to_rgb(*attributes[:, 6:9].unbind(1)).view(-1, 3, 1, 1)
        ornament = torch.where(sketched[rows].view(-1, 1, 1, 1), (_grey(main) < 0.55).float(), ornament)
        local_pixel = canvas.pixel / half
        amount = _pattern(px, py, things.pattern[rows], attributes, local_pixel).unsqueeze(1)
        tints = {
            "main": torch.lerp(main.expand(-1, 3, size, size), ornament.expand(-1, 3, size, size), amount.expand(-1, 3, size, size)),
            "solid": main,
            "second": hsv_to_rgb(*attributes[:, 3:6].unbind(1)).view(-1, 3, 1, 1),
            "light": torch.tensor([0.97, 0.95, 0.90]).view(1, 3, 1, 1),
            "dark": torch.tensor([0.13, 0.11, 0.14]).view(1, 3, 1, 1),
        }
        light = (1.02 - 0.16 * (px + py)).clamp(0.72, 1.25).unsqueeze(1)
        covered = torch.zeros(len(rows), size, size)
        for distance, tint in DRAW[word](px, py, attributes[:, 11:15], opened[rows].float()):
            edge = ((distance + 0.17) / 0.17).clamp(0, 1).unsqueeze(1)  # rounds the form towards its rim
            line = ((distance + 0.055) / local_pixel + 0.5).clamp(0, 1).unsqueeze(1)
            shade = light * (1 - 0.22 * edge**2) * (1 - 0.62 * line)
            part = canvas.cover(distance * half)
            paint = (tints[tint] * shade).clamp(0, 1)
            canvas.image = torch.lerp(canvas.image, paint.expand_as(canvas.image), part.unsqueeze(1).expand_as(canvas.image))
            covered = torch.maximum(covered, part)
        result[rows], coverage[rows] = canvas.image, covered
    return result, coverage


def _grey(image: Tensor) -> Tensor:
    """Luma [B, 1, H, W]."""
    return (image * torch.tensor([0.30, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _sketch(image: Tensor) -> Tensor:
    """Pencil on warm paper: a dark line where brightness changes, hatching where it is dark."""
    size = image.shape[-1]
    x, y = _grid(size)
    grey = _grey(image)
    hatch = ((x + y) * 5 % 1 < 0.4).float().unsqueeze(1) * (grey < 0.40)
    padded = torch.nn.functional.pad(grey, [1] * 4, mode="replicate")
    slope = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) ** 2 + (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) ** 2
    line = (3 * slope.sqrt()).clamp(0, 1)
    return (0.45 + 0.53 * grey - 0.12 * hatch - 0.55 * line).clamp(0.08, 1) * torch.tensor([1.0, 0.97, 0.90]).view(1, 3, 1, 1)


def _pixel_art(image: Tensor) -> Tensor:
    """Thirty-two large pixels across, in six steps of brightness a channel."""
    block = image.shape[-1] // 32
    coarse = (torch.nn.functional.avg_pool2d(image, block) * 5).round() / 5
    return coarse.repeat_interleave(block, 2).repeat_interleave(block, 3)


def render(pictures: Pictures, size: int = 128) -> tuple[Tensor, Tensor]:
    """Images [B, 3, size, size] in [0, 1] and masks [B, 2, size, size]: what is seen of the first and the second thing."""
    image = _background(pictures.scene, pictures.details, size)
    inside, paired = pictures.relation == 1, pictures.relation > 0
    never = torch.zeros(len(pictures), dtype=torch.bool)
    poses = pictures.poses
    # from back to front: what stands inside, then its container; else the second thing, then the first
    sketched = pictures.style == STYLES.index("sketch")
    image, inner = _place(image, pictures.first, poses[:, 0], never, sketched, inside)
    image, outer = _place(image, pictures.second, poses[:, 1], inside, sketched, paired)
    image, front = _place(image, pictures.first, poses[:, 0], never, sketched, ~inside)
    first, second = torch.maximum(inner * (1 - outer), front), outer * (1 - front)
    for word, stylise in (("sketch", _sketch), ("pixel art", _pixel_art)):
        rows = (pictures.style == STYLES.index(word)).nonzero().flatten()
        if len(rows):
            image[rows] = stylise(image[rows])
    return image.clamp(0, 1), torch.stack([first, second], dim=1)
