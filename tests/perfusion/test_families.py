"""perfusion.families: one record per family, and everything that the rest of the package takes from it."""

import dataclasses

import diffusers
import pytest

from perfusion.base import Base
from perfusion.checkpoint_file import configuration
from perfusion.concept_file.encoding import encode
from perfusion.families import CONDITIONINGS, CUSTOM, FAMILIES, Family, family_by_encoding_dim, family_by_id, family_by_widths, register
from tests.perfusion.editing import make_concept

# cross-attention layers of the published models: name -> width, by family
ATTENTION = "attentions.{}.transformer_blocks.{}.attn2"
SD = {
    **{f"down_blocks.{b}.{ATTENTION.format(a, 0)}": 320 * 2**b for b in range(3) for a in range(2)},
    **{f"up_blocks.{b}.{ATTENTION.format(a, 0)}": 1280 // 2 ** (b - 1) for b in range(1, 4) for a in range(3)},
    f"mid_block.{ATTENTION.format(0, 0)}": 1280,
}
XL = {
    **{f"down_blocks.{b}.{ATTENTION.format(a, t)}": w for b, w, n in ((1, 640, 2), (2, 1280, 10)) for a in range(2) for t in range(n)},
    **{f"up_blocks.{b}.{ATTENTION.format(a, t)}": w for b, w, n in ((0, 1280, 10), (1, 640, 2)) for a in range(3) for t in range(n)},
    **{f"mid_block.{ATTENTION.format(0, t)}": 1280 for t in range(10)},
}
PIXART = {f"transformer_blocks.{number}.attn2": 1152 for number in range(28)}
LAYERS = {"sd1": SD, "sd2": SD, "sdxl": XL, "kolors": XL, "pixart": PIXART}
LONGEST = dict(superclass="s" * 64, license="l" * 64, author="ä" * 32, covariance="c" * 24, recipe={"r": "x" * 236})


@pytest.mark.parametrize("id", FAMILIES)
def test_a_family_is_found_by_all_that_decides_it(id):
    family = FAMILIES[id]
    assert family_by_id(id) is family and family_by_widths(family.text_widths, family.encoding_dim) is family
    direct = family.encoding_dim == sum(family.text_widths)
    assert (family_by_widths(family.text_widths) is family) == direct == (family_by_encoding_dim(family.encoding_dim) is family)
    assert family.added_conditioning in CONDITIONINGS and len(family.text_encoders) == len(family.tokenizers) == len(family.text_widths)
    assert str(Base(id, family.encoding_dim, family.text_widths, {"layer": 4}, "")).startswith(family.title)


@pytest.mark.parametrize("id", FAMILIES)
def test_no_concept_file_is_larger_than_its_family_says(id):
    family = FAMILIES[id]
    base = Base(id, family.encoding_dim, family.text_widths, LAYERS[id], ".".join(["B" * 43 + "="] * len(family.text_widths)))
    size = len(encode(make_concept(base, "n" * 32, **LONGEST)))
    assert 0.8 * family.file_bytes < size <= family.file_bytes
    assert id != "sd1" or family.file_bytes == 32 * 1024


@pytest.mark.parametrize("id", [id for id, family in FAMILIES.items() if family.checkpoint is not None])
def test_a_checkpoint_of_a_family_is_configured_as_its_record_says(id):
    family, config = FAMILIES[id], configuration(id)
    assert config["unet"]["cross_attention_dim"] == family.encoding_dim
    assert config["unet"].get("addition_embed_type") == family.added_conditioning
    assert tuple(config[name]["hidden_size"] for name in family.text_encoders) == family.text_widths
    assert {name for name in config if name.startswith(("text_encoder", "tokenizer"))} == {*family.text_encoders, *family.tokenizers}
    assert config["unet"]["sample_size"] * 2 ** (len(config["vae"]["block_out_channels"]) - 1) == family.default_size
    assert all(hasattr(diffusers, name) for name in family.checkpoint.pipelines.values())


def test_adding_a_family_is_one_entry(monkeypatch):
    monkeypatch.setattr("perfusion.families.FAMILIES", dict(FAMILIES))
    new = Family("next", "Next Diffusion", (48,), ("text_encoder",), 48, None, 64, "next-diffusion", None)
    assert register(new) is new and family_by_widths((48,)) is new
    base = Base("next", 48, (48,), {"layer": 4}, "B" * 43 + "=")
    assert b"next-diffusion/perfusion" in encode(make_concept(base, "teddy"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(id="sd1"), "has the id or the widths of 'sd1'"),
        (dict(text_widths=(1024,), encoding_dim=1024), "has the id or the widths of 'sd2'"),
        (dict(added_conditioning="weather"), "added_conditioning must be one of"),
        (dict(text_widths=(1, 2)), "1 text encoders have 2 widths"),
    ],
)
def test_a_record_that_cannot_be_is_refused(change, message):
    before = dict(FAMILIES)
    record = Family("next", "Next Diffusion", (48,), ("text_encoder",), 48, None, 64, "next-diffusion", None)
    with pytest.raises(ValueError, match=message):
        register(dataclasses.replace(record, **change))
    assert FAMILIES == before


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CUSTOM.title = "another"
