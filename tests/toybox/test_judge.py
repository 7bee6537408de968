"""The judge: what it reads under its masks, how it ranks instances, and the distance between sets of pictures."""

import dataclasses

import pytest
import torch

from perfusion.models import TOYBOX
from perfusion.toybox.judge import CELLS, Judge, class_masks, frechet_distance, load_judge, save_judge
from perfusion.toybox.render import render
from perfusion.toybox.score import identity
from perfusion.toybox.words import OBJECTS
from perfusion.toybox.world import repeat_instance, sample_instances, sample_pictures

pytestmark = pytest.mark.toybox


@pytest.fixture(scope="module")
def judge():
    return load_judge(TOYBOX / "judge.safetensors")


def alone(things, generator):
    zeros = torch.zeros(len(things), dtype=torch.long)
    return render(sample_pictures(len(things), generator, first=things, relation=zeros, size=zeros, styled=0.0))[0]


def area_under_curve(above, below):
    """The share of pairs in the right order."""
    return (above[:, None] > below[None]).float().mean().item()


def test_things_are_told_apart_by_their_masks(judge):
    """Two things in a picture: the masks overlap the true ones, and each one's colour is read under its own."""
    pictures = sample_pictures(256, torch.Generator().manual_seed(8), pairs=1.0, styled=0.0)
    pictures = pictures.take((pictures.first.object_class != pictures.second.object_class).nonzero().flatten())
    images, masks = render(pictures)
    shares = class_masks(torch.nn.functional.avg_pool2d(masks, images.shape[-1] // CELLS), pictures)
    with torch.no_grad():
        found = judge(images).masks.softmax(1)
    assert (torch.minimum(found, shares).sum() / torch.maximum(found, shares).sum()) > 0.85
    for things in (pictures.first, pictures.second):
        seen = judge.read(images, things.object_class)["colour"]
        big = shares[torch.arange(len(seen)), things.object_class].sum((1, 2)) > 8
        assert (seen == things.colour)[big].float().mean() > 0.9


@pytest.mark.parametrize("word", OBJECTS)
def test_identity_ranks_instances(judge, word):
    """Other pictures of the instance are above near misses, of the same colour word and pattern, and these above strangers of the class.

    Over all classes the first area is 0.990, the others are 1; a near miss may happen to be almost the same thing.
    """
    generator = torch.Generator().manual_seed(4)
    pool = sample_instances(4000, generator, word)
    near_misses, strangers = [], []
    aucs = []
    for row in range(3):
        mine = repeat_instance(pool, row, 24)
        same = ((pool.colour == pool.colour[row]) & (pool.pattern == pool.pattern[row])).nonzero().flatten()
        others = pool.take(same[same != row][:24])
        any_other = (pool.colour != pool.colour[row]).nonzero().flatten()[:24]
        anchor = judge.features(alone(repeat_instance(pool, row, 5), generator), OBJECTS.index(word)).mean(0)
        pictures = (alone(things, generator) for things in (mine, others, pool.take(any_other)))
        true, near, strange = (judge.features(images, OBJECTS.index(word)) @ anchor for images in pictures)
        near_misses.append(area_under_curve(true, near))
        strangers.append(area_under_curve(near, strange))
        aucs.append(area_under_curve(true, strange))
    assert min(aucs) >= 0.99 and min(strangers) >= 0.99, (aucs, strangers)
    assert sum(near_misses) / 3 >= 0.97, near_misses


def test_identity_is_one_for_true_pictures_and_zero_for_the_superclass(judge):
    generator = torch.Generator().manual_seed(3)
    teddies = sample_instances(24, generator, "teddy")
    mine = repeat_instance(teddies, 0, 24)
    kind = OBJECTS.index("teddy")
    references, true, others = alone(mine, generator)[:5], alone(mine, generator), alone(teddies, generator)
    assert identity(judge, references, true, others, true, kind) == pytest.approx(1)
    assert identity(judge, references, others, others, true, kind) == pytest.approx(0)


def test_frechet_distance_is_that_of_gaussians():
    """Against the closed form for commuting covariances, and 0 for the same set."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T)).T)  # covariance exactly 1
    scale = torch.tensor([1.0, 2, 3, 1, 0.5, 1], dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a * scale + 2) == pytest.approx(6 * 4 + ((scale - 1) ** 2).sum().item(), rel=1e-6)


def test_a_saved_judge_reads_the_same(tmp_path):
    torch.manual_seed(0)
    judge = Judge().half().float().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    images = torch.rand(2, 3, 128, 128)
    before, after = judge.see(images)[1], load_judge(tmp_path / "judge.safetensors").see(images)[1]
    assert all(torch.equal(getattr(before, f.name), getattr(after, f.name)) for f in dataclasses.fields(before) if f.name != "labels")
