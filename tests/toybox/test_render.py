"""The renderer: deterministic, anti-aliased, with masks that are exact."""

import dataclasses

import pytest
import torch

from perfusion.toybox.render import hsv_to_rgb, render
from perfusion.toybox.words import OBJECTS, RELATIONS, SCENES
from perfusion.toybox.world import repeat_instance, sample_instances, sample_pictures

pytestmark = pytest.mark.toybox


def pictures(count=64, seed=0, **kinds):
    return sample_pictures(count, torch.Generator().manual_seed(seed), **kinds)


def test_range_and_shape():
    images, masks = render(pictures())
    assert images.shape == (64, 3, 128, 128) and masks.shape == (64, 2, 128, 128)
    assert 0 <= images.min() and images.max() <= 1 and 0 <= masks.min() and masks.max() <= 1
    assert images.isfinite().all()


def test_batches_change_nothing():
    """A picture does not depend on what is rendered beside it."""
    drawn = pictures(8)
    whole = render(drawn)[0]
    for row in range(8):
        assert torch.allclose(render(drawn.take(torch.tensor([row])))[0][0], whole[row], atol=1e-6)


def test_edges_are_anti_aliased():
    _, masks = render(pictures(pairs=0.0))
    soft = ((masks[:, 0] > 0.02) & (masks[:, 0] < 0.98)).float().mean((1, 2))
    assert (soft > 0.005).all()


@pytest.mark.parametrize("word", OBJECTS)
def test_every_object_is_seen_and_fits(word):
    things = sample_instances(64, torch.Generator().manual_seed(1), word)
    _, masks = render(pictures(first=things, relation=torch.zeros(64, dtype=torch.long)))
    covered = masks[:, 0].mean((1, 2))
    assert covered.min() > 0.04 and covered.max() < 0.6
    border = torch.cat([masks[:, 0, 0], masks[:, 0, :, 0], masks[:, 0, :, -1]], dim=1)
    assert border.mean() < 0.05


def test_the_mask_is_where_the_thing_changes_the_picture():
    """Two pictures that differ in the first thing's colour alone differ inside its mask alone, and nearly all over it."""
    drawn = pictures(32, pairs=0.0, styled=0.0)
    plain = dataclasses.replace(drawn.first, pattern=torch.zeros(32, dtype=torch.long))
    recoloured = dataclasses.replace(plain, attributes=plain.attributes.clone())
    recoloured.attributes[:, 0] = (recoloured.attributes[:, 0] + 0.5) % 1
    images, masks = render(dataclasses.replace(drawn, first=plain))
    changed = (images - render(dataclasses.replace(drawn, first=recoloured))[0]).abs().amax(1)
    assert changed[masks[:, 0] == 0].max() == 0
    assert (changed[masks[:, 0] > 0.99] > 0.02).float().mean() > 0.4


def test_an_instance_keeps_its_colours_in_every_scene():
    things = repeat_instance(sample_instances(1, torch.Generator().manual_seed(5), "robot"), 0, len(SCENES))
    none = torch.zeros(len(SCENES), dtype=torch.long)
    drawn = pictures(len(SCENES), first=things, scene=torch.arange(len(SCENES)), relation=none, styled=0.0)
    images, masks = render(drawn)
    inside = masks[:, :1] > 0.99
    means = (images * inside).sum((2, 3)) / inside.sum((2, 3))
    assert means.std(0).max() < 0.04
    assert images.mean((2, 3)).std(0).max() > 0.1


@pytest.mark.smoke
def test_in_hides_the_lower_part_and_on_does_not():
    teddies = sample_instances(64, torch.Generator().manual_seed(1), "teddy")
    pots = sample_instances(64, torch.Generator().manual_seed(2), "teapot")

    def seen(relation):
        rows = torch.full((64,), RELATIONS.index(relation))
        drawn = pictures(first=teddies, second=pots, relation=rows)
        return render(drawn)[1][:, 0].sum((1, 2)) / drawn.poses[:, 0, 2] ** 2

    assert seen("in").mean() < 0.8 * seen("on").mean()
    assert seen("in").min() > 0


def test_beside_leaves_both_visible():
    _, masks = render(pictures(64, relation=torch.full((64,), 3)))
    assert (masks.sum((2, 3)) > 60).all()


def test_sketches_have_one_hue():
    images, _ = render(dataclasses.replace(pictures(16), style=torch.ones(16, dtype=torch.long)))
    assert (images[:, 0] >= images[:, 1]).all() and (images[:, 1] >= images[:, 2]).all()
    assert torch.allclose(images[:, 2] / images[:, 0], torch.tensor(0.9), atol=1e-4)


def test_hsv_agrees_with_the_standard_library():
    import colorsys

    hue, saturation, value = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([colorsys.hsv_to_rgb(*map(float, row)) for row in zip(hue, saturation, value)])
    assert torch.allclose(hsv_to_rgb(hue, saturation, value), expected, atol=1e-5)
