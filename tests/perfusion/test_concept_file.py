"""perfusion.concept_file: what a file weighs, what comes back, and what a failed save leaves."""

import base64
import os
import stat
import subprocess
import sys

import pytest
import safetensors
import torch
from diffusers import UNet2DConditionModel

from perfusion import concept_file
from perfusion.base import Base, cross_attention_layers, describe_base, layer_width
from perfusion.concept import Concept
from perfusion.concept_file import decode_layers, encode_layers
from perfusion.concept_file.encoding import encode
from tests.perfusion.concepts import FIELDS, TENSORS, make, same
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

SD15 = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768)
SDXL = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
)  # fmt: skip
# Every field as long as it may be: 64 bytes in UTF-8, also where JSON escapes or a script needs several bytes a letter.
LONGEST = dict(
    name="n" * 32, superclass='"' * 32, license="l" * 64, author="テ" * 21 + "a", covariance="c" * 24,
    recipe={"note": "x" * (248 - 15)}, bias=-1.2345678901234567e-100, temperature=0.0012345678901234567,
)  # fmt: skip


def true_layers(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return {name: layer_width(layer) for name, layer in cross_attention_layers(unet).items()}


def make_base(family, widths, layers):
    fingerprint = ".".join(base64.b64encode(bytes(range(40 + i, 72 + i))).decode() for i in range(len(widths)))
    return Base(family, sum(widths), widths, layers, fingerprint)


@pytest.fixture(scope="module")
def sd15():
    return make_base("sd1", (768,), true_layers(SD15))


@pytest.fixture(scope="module")
def sdxl():
    return make_base("sdxl", (768, 1280), true_layers(SDXL))


@pytest.fixture(scope="module")
def small():
    return describe_base(tiny_sd())


# Layers


def test_layer_names_are_stored_short_and_come_back(sd15, sdxl):
    text = encode_layers(sd15.layers)
    assert text.startswith("d0.0.0=320 d0.1.0 d1.0.0=640 ") and text.endswith(" m0.0=1280")
    for base in (sd15, sdxl):
        assert list(decode_layers(encode_layers(base.layers)).items()) == list(base.layers.items())
    assert (len(sd15.layers), sd15.outputs, len(sdxl.layers), sdxl.outputs) == (16, 12480, 70, 83200)


def test_other_layer_names_are_stored_in_full():
    layers = {
        "mid_block.attentions.0.transformer_blocks.0.attn2": 8,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": 8,
        "encoder.layers.0.cross": 4,
        "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2": 8,
    }
    text = encode_layers(layers)
    assert text.startswith("m0.0=8 down_blocks.0.attentions.0.transformer_blocks.0.attn1 encoder.layers.0.cross=4 ")
    assert list(decode_layers(text).items()) == list(layers.items())


UNTIDY = "down_blocks.00.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize("name", ["d0.0.0", "m0.0", "a b", "a=1", "", "é", UNTIDY, "x" * 129])
def test_layer_names_that_would_not_come_back_are_refused(name):
    with pytest.raises(ValueError, match="layer names must be dotted module names"):
        encode_layers({name: 4})


@pytest.mark.parametrize(
    "text", ["", "d0.0.0", "d0.0.0=0", "d0.0.0=08", "d0.0.0=4 d0.0.0", "d0.0.0=4  m0.0", "d٠.0.0=4", "m0.0=9999999"]
)
def test_layer_text_that_was_not_written_here_is_refused(text):
    with pytest.raises(ValueError):
        decode_layers(text)


# Size


def test_sd15_fits_into_32_kib_with_every_field_at_its_longest(sd15, tmp_path):
    make(sd15, **LONGEST).save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size <= 32_768
    make(sd15).save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size <= 32_768 - 500


def test_sdxl_fits_into_192_kib_with_every_field_at_its_longest(sdxl):
    assert len(encode(make(sdxl, **LONGEST))) <= 196_608


# Round trip


@pytest.mark.parametrize("keys", [False, True], ids=["locked", "keys"])
@pytest.mark.parametrize("which", ["sd15", "sdxl", "small"])
def test_float32_round_trip_is_exact(which, keys, request, tmp_path):
    concept = make(request.getfixturevalue(which), keys=keys, **LONGEST)
    concept.save(tmp_path / "c.safetensors", dtype=torch.float32)
    loaded = Concept.load(tmp_path / "c.safetensors")
    assert same(concept, loaded)
    assert encode(loaded, torch.float32) == (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize("dtype, step", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_round_trip_is_rounding(sd15, dtype, step):
    concept = make(sd15)
    loaded = Concept.from_bytes(encode(concept, dtype))
    for field in TENSORS[:-1]:
        exact, rounded = getattr(concept, field), getattr(loaded, field)
        assert rounded.dtype == torch.float32
        assert ((exact - rounded).abs() <= step * exact.abs() + 2**-25).all(), field
    assert all(getattr(concept, f) == getattr(loaded, f) for f in FIELDS)
    noise = torch.randn(11, 768, generator=torch.Generator().manual_seed(3))
    probes = concept.target * torch.linspace(-1, 1.5, 11)[:, None] + noise
    torch.testing.assert_close(loaded.similarity(probes), concept.similarity(probes), atol=4 * step, rtol=0)
    assert same(Concept.from_bytes(encode(loaded, dtype)), loaded)


def test_pipelines_of_every_kind_round_trip(tmp_path):
    for pipe in (tiny_sd(), tiny_sdxl()):
        base = describe_base(pipe)
        make(base).save(tmp_path / "c.safetensors")
        assert Concept.load(tmp_path / "c.safetensors").base == base


def test_equal_concepts_give_equal_bytes_in_every_process(small):
    """Metadata order must not depend on a hash seed."""
    script = (
        "import sys, torch; from perfusion.base import Base; from perfusion.concept import Concept;"
        "from perfusion.concept_file.encoding import encode;"
        "b = Base('custom', 4, (4,), {'a.b': 4}, 'B' * 43 + '='); o = torch.ones(4);"
        "c = Concept(name='a', superclass='b', base=b, value_outputs=o, target=o, metric_target=o, superclass_encoding=o,"
        "word_embeddings=(o,), recipe={'steps': 4}, created='2025-01-01T00:00:00Z', author='x', license='y');"
        "sys.stdout.write(encode(c).hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_other_programs_can_read_the_file(sd15, tmp_path):
    path = tmp_path / "c.safetensors"
    make(sd15, author="A. Author", license="CC0-1.0").save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["metric_target", "superclass_encoding", "target", "value_outputs", "word_embedding"]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/perfusion"
    assert metadata["modelspec.implementation"] == "diffusers"
    assert metadata["modelspec.title"] == metadata["perfusion.name"] == "my-teddy"
    assert (metadata["modelspec.author"], metadata["modelspec.license"]) == ("A. Author", "CC0-1.0")


# Saving


def test_save_refuses_what_a_type_cannot_hold(small, tmp_path):
    path = tmp_path / "c.safetensors"
    make(small).save(path)
    before = path.read_bytes()
    loud = make(small, value_outputs=torch.full((40,), 1e5))
    with pytest.raises(ValueError, match=r"value_outputs does not fit float16: its largest entry is 1e\+05.*dtype=torch.float32"):
        loud.save(path)
    faint = make(small, word_embeddings=(torch.full((16,), 3e-7),))
    with pytest.raises(ValueError, match="word_embedding does not fit float16: .*would change it by"):
        faint.save(path)
    with pytest.raises(ValueError, match="holds float16, bfloat16 or float32, got torch.float64"):
        loud.save(path, dtype=torch.float64)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]
    loud.save(path, dtype=torch.bfloat16)
    faint.save(path, dtype=torch.bfloat16)


def test_save_refuses_an_energy_that_rounding_destroys(small):
    target = torch.zeros(16)
    target[:2] = torch.tensor([1.0001, 1.0])
    metric = torch.zeros(16)
    metric[:2] = torch.tensor([1.0, -1.0])
    concept = make(small, target=target, metric_target=metric)
    with pytest.raises(ValueError, match="energy .* does not survive float16: 0.0001.* would become 0"):
        encode(concept)
    assert same(Concept.from_bytes(encode(concept, torch.float32)), concept)


def test_a_failed_write_leaves_the_old_file_and_no_litter(small, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    make(small).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(concept_file.os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                make(small, seed=1).save(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]


def test_save_makes_folders_and_ordinary_permissions(small, tmp_path):
    path = tmp_path / "a" / "b" / "c.safetensors"
    make(small).save(path)
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
