"""The world: what captions say, what they leave open, and where things stand."""

import pytest
import torch

from perfusion.toybox.words import COLOURS, CONTAINERS, HUE_SPREAD, OBJECTS, PATTERNS, RELATIONS, SCENES, SIZES, STYLES
from perfusion.toybox.world import ATTRIBUTES, caption, repeat_instance, sample_instances, sample_pictures, with_article

pytestmark = pytest.mark.toybox


def pictures(count=512, seed=0, **kinds):
    return sample_pictures(count, torch.Generator().manual_seed(seed), **kinds)


def test_the_world_is_as_large_as_promised():
    assert len(OBJECTS) >= 8 and len(COLOURS) >= 8 and len(PATTERNS) - 1 >= 3 and len(SCENES) >= 6
    assert set(RELATIONS) == {"alone", "in", "on", "next to"}


def test_the_same_seed_draws_the_same_pictures():
    a, b, c = pictures(seed=3), pictures(seed=3), pictures(seed=4)
    assert torch.equal(a.poses, b.poses) and torch.equal(a.first.attributes, b.first.attributes)
    assert not torch.equal(a.poses, c.poses)


def test_hues_stay_inside_their_word_and_vary_there():
    things = sample_instances(4000, torch.Generator().manual_seed(0))
    for index, (hue, _, _) in enumerate(COLOURS.values()):
        degrees = things.attributes[things.colour == index, ATTRIBUTES.index("hue")] * 360
        away = (degrees - hue + 180) % 360 - 180
        assert away.abs().max() <= HUE_SPREAD + 1e-3
        assert away.std() > HUE_SPREAD / 3


def test_instances_of_one_caption_differ():
    things = sample_instances(200, torch.Generator().manual_seed(0), "teddy")
    assert (things.object_class == OBJECTS.index("teddy")).all()
    assert (things.attributes.std(0) > 0.01).all()


def test_only_containers_hold_something():
    drawn = pictures(4000, pairs=1.0)
    inside = drawn.second.object_class[drawn.relation == 1]
    assert len(inside) > 100
    assert {OBJECTS[index] for index in inside.tolist()} == set(CONTAINERS)


def test_captions_say_what_is_there():
    drawn = pictures(400, styled=0.3)
    texts = caption(drawn, torch.Generator().manual_seed(1), named=1.0)
    for row, text in enumerate(texts):
        words = text.split()
        assert OBJECTS[drawn.first.object_class[row]] in words
        assert list(COLOURS)[drawn.first.colour[row]] in words
        assert (PATTERNS[drawn.first.pattern[row]] in words) or drawn.first.pattern[row] == 0
        assert (SIZES[drawn.size[row]] in words) or drawn.size[row] == 0
        assert all((style in text) == (index == drawn.style[row]) for index, style in enumerate(STYLES) if index)
        if drawn.relation[row]:
            assert RELATIONS[drawn.relation[row]] in text and OBJECTS[drawn.second.object_class[row]] in words


def test_captions_often_leave_colour_open_and_always_name_patterns():
    drawn = pictures(2000, pairs=0.0)
    texts = caption(drawn, torch.Generator().manual_seed(1))
    silent = [not set(text.split()) & set(COLOURS) for text in texts]
    assert 0.2 < sum(silent) / len(silent) < 0.4
    assert all((PATTERNS[pattern] in text) == (pattern > 0) for pattern, text in zip(drawn.first.pattern, texts))


def test_captions_are_many():
    generator = torch.Generator().manual_seed(0)
    texts = {text for _ in range(50) for text in caption(sample_pictures(512, generator), generator)}
    assert len(texts) > 15_000


def test_articles():
    assert with_article("a {}", "orange mug") == "an orange mug"
    assert with_article("a photo of a {}", "orange mug") == "a photo of an orange mug"
    assert with_article(" in a {}", "red mug") == " in a red mug"


def test_repeat_instance():
    things = sample_instances(3, torch.Generator().manual_seed(0))
    again = repeat_instance(things, 1, 4)
    assert len(again) == 4 and torch.equal(again.attributes, things.attributes[1].expand(4, -1))
