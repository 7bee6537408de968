"""Signed distances of the toybox objects: negative inside, in units of the object's half size.

Every `draw_*` takes local coordinates x, y [B, H, W] (x to the right, y down, the object inside [-1, 1]) and
proportions p [B, 4] in [0, 1], and yields parts `(distance [B, H, W], tint)` from back to front. Tints: "main" carries
the colour and pattern that captions name, "solid" the colour alone, "second" the instance's own second colour; "light"
and "dark" are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Part = tuple[Tensor, str]


def ellipse(x: Tensor, y: Tensor, cx, cy, rx, ry) -> Tensor:
    px, py = (x - cx) / rx, (y - cy) / ry
    radius = torch.sqrt(px**2 + py**2 + 1e-9)
    gradient = torch.sqrt((px / rx) ** 2 + (py / ry) ** 2 + 1e-9)
    return radius * (radius - 1) / gradient


def circle(x: Tensor, y: Tensor, cx, cy, r) -> Tensor:
    return torch.sqrt((x - cx) ** 2 + (y - cy) ** 2 + 1e-9) - r


def ring(x: Tensor, y: Tensor, cx, cy, r, thickness) -> Tensor:
    return circle(x, y, cx, cy, r).abs() - thickness


def box(x: Tensor, y: Tensor, cx, cy, hx, hy, corner=0.06) -> Tensor:
    dx, dy = (x - cx).abs() - hx + corner, (y - cy).abs() - hy + corner
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2 + 1e-9)
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def capsule(x: Tensor, y: Tensor, x0, y0, x1, y1, r) -> Tensor:
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2)).clamp(0, 1)
    return torch.sqrt((x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2 + 1e-9) - r


def trapezoid(x: Tensor, y: Tensor, cx, top, bottom, half_top, half_bottom) -> Tensor:
    along = ((y - top) / (bottom - top)).clamp(0, 1)
    half = half_top + (half_bottom - half_top) * along
    return torch.maximum(torch.maximum(top - y, y - bottom), ((x - cx).abs() - half) * 0.9)


def union(*distances: Tensor) -> Tensor:
    result = distances[0]
    for distance in distances[1:]:
        result = torch.minimum(result, distance)
    return result


def _spread(p: Tensor) -> list[Tensor]:
    return [column.view(-1, 1, 1) for column in p.unbind(1)]


def draw_teddy(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    ear, belly, head, girth = _spread(p)
    ear, belly, head, girth = 0.17 + 0.12 * ear, 0.15 + 0.12 * belly, 0.42 + 0.10 * head, 0.42 + 0.16 * girth
    mirrored = x.abs()
    yield union(ellipse(mirrored, y, 0.42, 0.82, 0.25, 0.17), capsule(mirrored, y, girth - 0.04, 0.20, girth + 0.20, 0.46, 0.15)), "main"
    yield ellipse(x, y, 0, 0.42, girth, 0.50), "main"
    yield ellipse(x, y, 0, 0.48, belly, belly * 1.15), "second"
    yield circle(mirrored, y, head * 0.86, -0.40 - head * 0.76, ear), "solid"
    yield circle(mirrored, y, head * 0.86, -0.40 - head * 0.76, ear * 0.55), "second"
    yield ellipse(x, y, 0, -0.40, head * 1.14, head), "solid"
    yield ellipse(x, y, 0, -0.22, 0.25, 0.18), "light"
    yield union(circle(mirrored, y, 0.21, -0.50, 0.10), ellipse(x, y, 0, -0.29, 0.11, 0.08)), "dark"


def draw_teapot(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    spout, handle, height, knob = _spread(p)
    spout, handle, height, knob = 0.22 * spout, 0.24 + 0.09 * handle, 0.48 + 0.12 * height, 0.09 + 0.08 * knob
    top = 0.28 - height
    yield ring(x, y, -0.62, 0.22, handle, 0.085), "second"
    yield union(
        capsule(x, y, 0.40, 0.40, 0.72, 0.06 - spout, 0.14), capsule(x, y, 0.72, 0.06 - spout, 0.90, -0.12 - spout, 0.10)
    ), "solid"
    lid = ellipse(x, y, 0, top + 0.02, 0.36, 0.16)
    absent = opened.view(-1, 1, 1) * 9.0  # something stands in the pot: the lid is off
    yield union(lid + absent, box(x, y, 0, 0.28 + height, 0.34, 0.09)), "second"
    yield circle(x, y, 0, top - 0.18 - knob * 0.5, knob) + absent, "second"
    yield ellipse(x, y, 0, 0.28, 0.60, height), "main"


def draw_mug(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    height, handle, taper, band = _spread(p)
    height, handle, taper, band = 0.50 + 0.22 * height, 0.24 + 0.12 * handle, 0.14 * taper, 0.05 + 0.08 * band
    yield ring(x, y, 0.56, 0.14, handle, 0.095), "second"
    yield ellipse(x, y, 0, 0.12 - height, 0.53, 0.13), "dark"
    wall = trapezoid(x, y, 0, 0.14 - height, 0.14 + height, 0.53, 0.53 - taper)
    yield torch.maximum(wall, -ellipse(x, y, 0, 0.10 - height, 0.50, 0.12)), "main"
    yield torch.maximum(box(x, y, 0, 0.08 + height, 0.60, band), wall), "second"


def draw_boat(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    sail, depth, mast, flag = _spread(p)
    sail, depth, mast, flag = 0.70 + 0.35 * sail, 0.36 + 0.18 * depth, -0.20 + 0.25 * mast, 0.12 + 0.16 * flag
    top = 0.30 - sail
    absent = opened.view(-1, 1, 1) * 9.0  # somebody stands in the boat: the mast is down
    yield box(x, y, mast, 0.5 * (top - 0.22 + 0.4), 0.045, 0.5 * (0.62 - top)) + absent, "dark"
    yield trapezoid(x, y, mast + 0.04 + flag * 0.5, top - 0.20, top - 0.02, flag * 0.5, flag * 0.5) + absent, "solid"
    right = torch.maximum(trapezoid(x, y, mast + 0.06, top, 0.32, torch.zeros_like(mast), 0.62 + 0 * mast), mast + 0.05 - x)
    left = torch.maximum(trapezoid(x, y, mast - 0.06, top + 0.22, 0.32, torch.zeros_like(mast), 0.46 + 0 * mast), x - mast + 0.05)
    yield union(right, left) + absent, "second"
    yield trapezoid(x, y, 0, 0.38, 0.38 + depth, 0.92 + 0 * depth, 0.52 + 0 * depth), "main"
    yield box(x, y, 0, 0.40, 0.94, 0.06), "light"


def draw_car(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    cabin, wheel, height, place = _spread(p)
    cabin, wheel, height, place = 0.38 + 0.20 * cabin, 0.20 + 0.07 * wheel, 0.24 + 0.11 * height, -0.18 + 0.30 * place
    absent = opened.view(-1, 1, 1) * 9.0  # somebody stands in the car: the roof is down
    roof = 0.28 - height
    yield trapezoid(x, y, place, roof - 0.46, roof + 0.08, cabin * 0.70, cabin * 1.12) + absent, "solid"
    yield trapezoid(x, y, place, roof - 0.36, roof - 0.02, cabin * 0.52, cabin * 0.84) + absent, "light"
    yield box(x, y, 0, 0.28, 0.94, height, 0.16), "main"
    yield box(x, y, 0.86, 0.22, 0.09, 0.09), "light"
    yield union(circle(x, y, -0.52, 0.30 + height, wheel), circle(x, y, 0.52, 0.30 + height, wheel)), "dark"
    yield union(circle(x, y, -0.52, 0.30 + height, wheel * 0.5), circle(x, y, 0.52, 0.30 + height, wheel * 0.5)), "second"


def draw_fish(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    height, tail, fin, eye = _spread(p)
    height, tail, fin, eye = 0.42 + 0.16 * height, 0.28 + 0.20 * tail, 0.22 + 0.18 * fin, 0.08 + 0.05 * eye
    along = ((-x - 0.40) / 0.50).clamp(0, 1)
    yield torch.maximum(torch.maximum(x + 0.40, -0.92 - x), (y.abs() - 0.06 - tail * along) * 0.8), "second"
    yield ellipse(x, y, 0.0, -height * 0.8, fin * 1.2, fin), "second"
    yield ellipse(x, y, 0.14, 0, 0.70, height), "main"
    yield ellipse(x, y, 0.10, height * 0.30, fin * 0.7, fin * 0.45), "second"
    yield circle(x, y, 0.52, -height * 0.25, eye * 1.7), "light"
    yield circle(x, y, 0.54, -height * 0.25, eye), "dark"


def draw_house(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    roof, width, door, chimney = _spread(p)
    roof, width, door, chimney = 0.36 + 0.26 * roof, 0.52 + 0.20 * width, -0.26 + 0.52 * door, 0.10 + 0.08 * chimney
    yield box(x, y, width * 0.55, -0.42, chimney, 0.34, 0.02), "dark"
    yield box(x, y, 0, 0.40, width, 0.52, 0.03), "main"
    yield trapezoid(x, y, 0, -0.12 - roof, -0.06 + 0 * roof, 0.05 + 0 * roof, width * 1.26), "second"
    yield box(x, y, door, 0.62, 0.14, 0.30, 0.03), "dark"
    yield box(x, y, door + torch.where(door > 0, -0.42, 0.42), 0.26, 0.15, 0.15, 0.03), "light"


def draw_robot(x: Tensor, y: Tensor, p: Tensor, opened: Tensor) -> Iterator[Part]:
    head, antenna, girth, arm = _spread(p)
    head, antenna, girth, arm = 0.34 + 0.12 * head, 0.06 + 0.10 * antenna, 0.38 + 0.14 * girth, 0.22 + 0.28 * arm
    mirrored = x.abs()
    yield capsule(x, y, 0, -0.66, 0, -0.74 - antenna, 0.045), "dark"
    yield circle(x, y, 0, -0.76 - antenna, 0.10), "second"
    yield union(box(mirrored, y, 0.24, 0.82, 0.14, 0.18), capsule(mirrored, y, girth + 0.08, 0.02, girth + 0.18, arm, 0.11)), "second"
    yield box(x, y, 0, 0.30, girth, 0.42, 0.08), "main"
    yield box(x, y, 0, -0.42, head * 1.20, 0.30, 0.08), "solid"
    yield circle(mirrored, y, head * 0.52, -0.46, 0.135), "light"
    yield union(circle(mirrored, y, head * 0.52, -0.46, 0.07), box(x, y, 0, -0.22, head * 0.60, 0.045, 0.01)), "dark"


DRAW: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Iterator[Part]]] = {
    "teddy": draw_teddy, "teapot": draw_teapot, "mug": draw_mug, "boat": draw_boat,
    "car": draw_car, "fish": draw_fish, "house": draw_house, "robot": draw_robot,
}  # fmt: skip


def rim(word: str, p: Tensor) -> Tensor:
    """How high [B] a container of proportions p [B, 4] hides what stands in it: y of its rim in local coordinates."""
    rims = {
        "teapot": -0.18 - 0.14 * p[:, 2], "mug": -0.36 - 0.22 * p[:, 0],
        "boat": torch.full_like(p[:, 0], 0.36), "car": 0.04 - 0.11 * p[:, 2],
    }  # fmt: skip
    return rims[word]
