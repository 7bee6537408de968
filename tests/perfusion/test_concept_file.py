"""perfusion.concept and perfusion.concept_file: what a concept may be, what a file weighs, and what reading survives."""

import base64
import dataclasses
import json
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import zipfile

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from perfusion import concept_file
from perfusion.base import Base, cross_attention_layers, describe_base, layer_width
from perfusion.concept import Concept
from perfusion.concept_file import ConceptFileError, decode, decode_layers, encode, encode_layers
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


def make(base, *, keys=False, seed=0, **fields):
    """A concept of plausible sizes: values about 1, encodings with a few large entries, word embeddings about 0.01."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size, scale=1.0):
        return torch.randn(size, generator=generator) * scale

    target = draw(base.encoding_dim)
    target[0] = 28.0
    tensors = dict(
        value_outputs=draw(base.outputs),
        target=target,
        metric_target=target + draw(base.encoding_dim, 0.1),
        superclass_encoding=draw(base.encoding_dim),
        word_embeddings=tuple(draw(width, 0.01) for width in base.text_widths),
        key_outputs=draw(base.outputs) if keys else None,
    )
    return Concept(**{**dict(name="my-teddy", superclass="teddy", base=base), **tensors, **fields})


TENSORS = ("value_outputs", "target", "metric_target", "superclass_encoding", "key_outputs")
FIELDS = ("name", "superclass", "base", "bias", "temperature", "covariance", "recipe", "created", "license", "author")


def same(a, b):
    """Equal in every field and every bit."""
    pairs = [(getattr(a, field), getattr(b, field)) for field in TENSORS]
    pairs += zip(a.word_embeddings, b.word_embeddings)
    tensors = all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)
    return tensors and len(a.word_embeddings) == len(b.word_embeddings) and all(getattr(a, f) == getattr(b, f) for f in FIELDS)


# Concept


def test_concept_computes_the_gate(small):
    concept = make(small)
    assert concept.metric_target.abs().max() == 1
    assert concept.similarity(concept.target).item() == pytest.approx(1, abs=1e-6)
    along = 0.7 * concept.target + torch.stack([concept.superclass_encoding, -concept.superclass_encoding])
    expected = (along @ concept.metric_target) / (concept.target @ concept.metric_target)
    torch.testing.assert_close(concept.similarity(along), expected)
    torch.testing.assert_close(concept.gate(along), torch.sigmoid((expected - 0.70) / 0.15))
    torch.testing.assert_close(concept.gate(along, 0.5, 0.1), torch.sigmoid((expected - 0.5) / 0.1))


def test_concept_splits_outputs_by_layer(small):
    concept = make(small, keys=True)
    parts = [concept.value_output(name) for name in small.layers]
    assert [len(part) for part in parts] == list(small.layers.values())
    assert torch.equal(torch.cat(parts), concept.value_outputs)
    assert torch.equal(torch.cat([concept.key_output(name) for name in small.layers]), concept.key_outputs)
    assert make(small).key_output(next(iter(small.layers))) is None
    with pytest.raises(KeyError, match="has no layer 'attn9'; its layers are down_blocks"):
        concept.value_output("attn9")


def test_concept_moves_and_prints(small):
    concept = make(small, keys=True)
    half = concept.to(dtype=torch.bfloat16)
    assert {getattr(half, field).dtype for field in TENSORS} | {half.word_embeddings[0].dtype} == {torch.bfloat16}
    assert half.metric_target.abs().max() == 1 and half.name == concept.name and half.created == concept.created
    assert concept.to("cpu").target.dtype == torch.float32
    text = "Concept('my-teddy', superclass='teddy', base=custom, layers=4, outputs=40, bias=0.7, temperature=0.15)"
    assert repr(make(small)) == text
    assert repr(concept).endswith("keys not locked)")


def test_concept_is_detached_and_frozen(small):
    concept = make(small, target=torch.ones(16, requires_grad=True), metric_target=torch.ones(16, requires_grad=True))
    assert not concept.target.requires_grad and not concept.metric_target.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.bias = 0.5


@pytest.mark.parametrize("name", ["", "-a", "_a", "Teddy", "a b", "a" * 33, "é", "a\n", "<a>", "../a", None, 3])
def test_bad_names_are_refused_with_the_rule(small, name):
    with pytest.raises(ValueError, match="name must be 1 to 32 characters of a-z, 0-9, '-' and '_', the first a letter or digit"):
        make(small, name=name)


@pytest.mark.parametrize("name", ["a", "0", "my-teddy_2", "n" * 32])
def test_good_names_pass(small, name):
    assert make(small, name=name).name == name


NAN = torch.full((16,), float("nan"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(superclass=""), "superclass must not be empty"),
        (dict(superclass="a\nb"), "superclass must be printable text on one line"),
        (dict(author="\x1b[31m"), "author must be printable"),
        (dict(license="x" * 65), "license must be at most 64 bytes .*got 65"),
        (dict(author="テ" * 22), "author must be at most 64 bytes .*got 66"),
        (dict(author=" a"), "author must not be empty or begin or end with a space"),
        (dict(covariance="c" * 25), "covariance must be at most 24 bytes"),
        (dict(recipe=[1]), "recipe must map text to"),
        (dict(recipe={1: 2}), "recipe must map text to"),
        (dict(recipe={"a": {"b": 1}}), "recipe must map text to"),
        (dict(recipe={"a": float("nan")}), "recipe must hold finite numbers"),
        (dict(recipe={"a": "\ud800"}), "recipe must hold printable text"),
        (dict(recipe={"a": ["b", "\x1b[2J"]}), "recipe must hold printable text"),
        (dict(recipe={"a\n": 1}), "recipe must hold printable text"),
        (dict(recipe={"a": "x" * 300}), "recipe must be at most 248 bytes as JSON text, got 312"),
        (dict(bias=float("nan")), "bias must be a number from -2 to 2, got nan"),
        (dict(bias=True), "bias must be a number"),
        (dict(temperature=0), "temperature must be a number from 0.001 to 10, got 0"),
        (dict(created="yesterday"), "created must be a UTC time like"),
        (dict(created="2025-13-01T00:00:00Z"), "created must be a UTC time like"),
        (dict(target=torch.ones(15)), r"target must be a floating point tensor of shape \(16,\), got torch.float32 \(15,\)"),
        (dict(target=torch.ones(16, dtype=torch.int64)), "target must be a floating point tensor .*int64"),
        (dict(superclass_encoding=NAN), "superclass_encoding must be finite"),
        (dict(value_outputs=torch.ones(4, 10)), r"value_outputs must be .* shape \(40,\), got torch.float32 \(4, 10\)"),
        (dict(key_outputs=[1.0]), r"key_outputs must be .*got list"),
        (dict(word_embeddings=torch.ones(1, 16)), "word_embeddings must be a tuple of 1, one per text encoder"),
        (dict(word_embeddings=(torch.ones(16), torch.ones(16))), "word_embeddings must be a tuple of 1"),
        (dict(word_embeddings=(torch.ones(3),)), r"word_embeddings\[0\] must be .*\(16,\)"),
        (dict(metric_target=torch.zeros(16)), "metric_target must not be all zero"),
        (dict(target=torch.ones(16), metric_target=-torch.ones(16)), "energy .* must be positive, got -16"),
    ],
)
def test_broken_fields_are_refused_by_name(small, fields, message):
    with pytest.raises(ValueError, match=message):
        make(small, **fields)


def test_a_base_must_be_a_base(small):
    with pytest.raises(ValueError, match="base must be a perfusion.base.Base, got str"):
        dataclasses.replace(make(small), base="sd1")


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
    loaded = decode(encode(concept, dtype))
    for field in TENSORS[:-1]:
        exact, rounded = getattr(concept, field), getattr(loaded, field)
        assert rounded.dtype == torch.float32
        assert ((exact - rounded).abs() <= step * exact.abs() + 2**-25).all(), field
    assert all(getattr(concept, f) == getattr(loaded, f) for f in FIELDS)
    noise = torch.randn(11, 768, generator=torch.Generator().manual_seed(3))
    probes = concept.target * torch.linspace(-1, 1.5, 11)[:, None] + noise
    torch.testing.assert_close(loaded.similarity(probes), concept.similarity(probes), atol=4 * step, rtol=0)
    assert same(decode(encode(loaded, dtype)), loaded)


def test_pipelines_of_every_kind_round_trip(tmp_path):
    for pipe in (tiny_sd(), tiny_sdxl()):
        base = describe_base(pipe)
        make(base).save(tmp_path / "c.safetensors")
        assert Concept.load(tmp_path / "c.safetensors").base == base


def test_equal_concepts_give_equal_bytes_in_every_process(small):
    """Metadata order must not depend on a hash seed."""
    script = (
        "import sys, torch; from perfusion.base import Base; from perfusion.concept import Concept;"
        "from perfusion.concept_file import encode;"
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
    assert same(decode(encode(concept, torch.float32)), concept)


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


# Foreign and hostile files


def parts(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def build(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def signed(header, payload):
    """The file with a digest that agrees: what a hostile writer would make."""
    tensors = {
        name: (entry["dtype"], entry["shape"][0], payload[slice(*entry["data_offsets"])])
        for name, entry in header.items() if name != "__metadata__"
    }  # fmt: skip
    header["__metadata__"]["perfusion.digest"] = concept_file._digest(header["__metadata__"], tensors)
    return build(header, payload)


def test_signing_as_the_tests_do_it_is_valid(small):
    concept = make(small)
    assert same(decode(signed(*parts(encode(concept, torch.float32)))), concept)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "at least 10 bytes, this one is 0"),
        (b"PK\x03\x04" + bytes(60), "It is a torch checkpoint .*perfusion convert"),
        (pickle.dumps({"a": list(range(50))}, protocol=2), "It is a torch checkpoint .*perfusion convert"),
        (pickle.dumps({"a": list(range(50))}, protocol=4), "It is a torch checkpoint .*perfusion convert"),
        (b"\xff" * 100, "header begins with '{', this file does not. The file is damaged"),
        (struct.pack("<Q", 2**63) + b"{}" + bytes(90), "the header is at most 65,536 bytes, this one claims 9,223"),
        (struct.pack("<Q", 200) + b"{}" + bytes(90), "claims 200 bytes and the file has 92 left"),
        (build(b'{"a": "\xff"}'), "must be UTF-8"),
        (build(b'{"a": 1, "a": 2}'), "a key stands twice"),
        (build(b'{"a": NaN}'), "NaN is not a number"),
        (build(b'{"a": ' + b"[" * 30000 + b"]" * 30000 + b"}"), "nested at most 4 deep"),
        (build(b'{"a": ' + b"1" * 60000 + b"}"), "invalid JSON"),
        (build(b'{"a": "' + b"\\" * 60000 + b"}"), "invalid JSON"),
        (build(b'{"a":'), "invalid JSON"),
        (build(b"{}" + b" " * 8), "metadata that maps text to text"),
        (build({"__metadata__": {"a": 1}}), "metadata that maps text to text"),
        (build({"__metadata__": {"ss_network_module": "lora"}}), "not a concept .no perfusion.format"),
        (build({"__metadata__": {"perfusion.format": "2"}}), "format version is '2', this Perfusion reads 1. Update"),
        (build({"__metadata__": {"perfusion.format": "1"}}), "metadata must have perfusion.name, and it is missing"),
        (bytes(5 * 2**20), "at most 4,194,304 bytes, this one is larger"),
        (b"PK\x03\x04" + bytes(5 * 2**20), "larger. It is a torch checkpoint"),
    ],
)
def test_foreign_files_are_refused_with_a_reason(data, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConceptFileError, match=message) as error:
        Concept.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_folders_pipes_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(ConceptFileError, match="not a regular file"):
        Concept.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConceptFileError, match="not a regular file"):
        Concept.load(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        Concept.load(tmp_path / "none")


def test_torch_checkpoints_and_zip_archives_are_named(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "b")
    for name in ("x.pt", "x.zip"):
        with pytest.raises(ConceptFileError, match="perfusion convert"):
            Concept.load(tmp_path / name)


def test_a_header_whose_length_looks_like_a_pickle_is_read(small):
    """A safetensors file whose header is 0x0280 bytes begins with the bytes of a pickle."""
    data = encode(make(small))
    header, payload = parts(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    size = -len(text) % 256 + len(text) + 0x80
    size += 256 * (((size >> 8) & 0xFF) not in (2, 3, 4, 5))
    assert struct.pack("<Q", size)[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert decode(build(text.ljust(size), payload)).name == "my-teddy"


def tensor(name, **changes):
    def edit(header, payload):
        header[name].update(changes)
        return header, payload

    return edit


def meta(**changes):
    def edit(header, payload):
        for key, value in changes.items():
            header["__metadata__"][key.replace("__", ".")] = value
        return header, payload

    return edit


def rename(old, new):
    def edit(header, payload):
        header[new] = header.pop(old)
        return header, payload

    return edit


def swap_spans(header, payload):
    """Two tensors of one size that both point at the first one's bytes: an overlap and a hole."""
    header["target"]["data_offsets"] = header["metric_target"]["data_offsets"]
    return header, payload


@pytest.mark.parametrize(
    "edit, message",
    [
        (tensor("target", dtype="I64"), "target must be F16, BF16, F32, got 'I64'"),
        (tensor("target", dtype=["F16"]), "target must be F16, BF16, F32, got"),
        (tensor("target", dtype="F32"), r"target must span 16 numbers of F32, got offsets \["),
        (tensor("target", shape=[4, 4]), r"target must have shape \[16\] for this base, got \[4, 4\]"),
        (tensor("target", shape=[True]), r"target must have shape \[16\]"),
        (tensor("target", shape=[16.0]), r"target must have shape \[16\]"),
        (tensor("target", shape=None), r"target must have shape \[16\] .*got None"),
        (tensor("word_embedding", shape=[17]), "must be the sum|target must have shape|must have shape"),
        (tensor("word_embedding", shape=[-1]), "word_embedding must have a shape of one number"),
        (tensor("word_embedding", shape=[10**30]), "word_embedding must have a shape of one number"),
        (tensor("target", data_offsets=[-32, 0]), "target must span"),
        (tensor("target", data_offsets=[2**62, 2**62 + 32]), "target must span"),
        (tensor("target", data_offsets=[0]), "target must span"),
        (swap_spans, "tensors must lie back to back"),
        (lambda h, p: ({**h, "target": "x"}, p), "target must be F16, BF16, F32, got None"),
        (lambda h, p: ({**h, "extra": h["target"]}, p), "tensors must be .*; 'extra' is not one of them"),
        (rename("target", "targét"), "'targ.xe9t' is not one of them"),
        (rename("word_embedding", "word_embedding_2"), "must include word_embedding, and it is missing"),
        (lambda h, p: ({k: v for k, v in h.items() if k != "target"}, p), "tensors must be .*; target is missing"),
        (lambda h, p: (h, p[:-1]), "cut short"),
        (lambda h, p: (h, p + b"\0"), "followed by other data"),
        (meta(perfusion__layers="d0.0.0=8"), r"value_outputs must have shape \[8\] for this base, got \[40\]"),
        (meta(perfusion__layers="d0.0.0"), "not a layer name"),
        (meta(perfusion__layers=" ".join(["m0.0=1"] * 2000)), "at most 1024 layers, got 2000"),
        (meta(perfusion__family="sd1"), "family must be 'custom'"),
        (meta(perfusion__text_encoder="AAAA"), "not a text encoder fingerprint"),
        (meta(perfusion__digest="0" * 16), "digest must match the content"),
        (meta(perfusion__name="other"), "digest must match the content"),
        (meta(modelspec__author="somebody else"), "digest must match the content"),
    ],
)
def test_hostile_headers_are_refused_by_the_rule_they_break(small, edit, message):
    with pytest.raises(ConceptFileError, match=message):
        decode(build(*edit(*parts(encode(make(small))))))


@pytest.mark.parametrize(
    "edit, message",
    [
        (meta(perfusion__name="../../etc/passwd"), "name must be 1 to 32 characters"),
        (meta(perfusion__superclass="\x1b]0;title\x07"), r"superclass must be printable text on one line, got .*\\x1b"),
        (meta(modelspec__author="x" * 65), "author must be at most 64 bytes"),
        (meta(perfusion__bias="nan"), "perfusion.bias must be a number, got 'nan'"),
        (meta(perfusion__bias="9e999"), "bias must be a number from -2 to 2, got inf"),
        (meta(perfusion__temperature="0"), "temperature must be a number from"),
        (meta(perfusion__recipe="[1]"), "recipe must map text"),
        (meta(perfusion__recipe='{"a": Infinity}'), "Infinity is not a number"),
        (meta(perfusion__recipe='{"a": "\\u001b[2J"}'), "recipe must hold printable text"),
        (meta(perfusion__recipe='{"a": {"b": 1}}'), "recipe must map text"),
        (meta(modelspec__date="today"), "created must be a UTC time"),
    ],
)
def test_hostile_metadata_with_a_valid_digest_is_refused(small, edit, message):
    with pytest.raises(ConceptFileError, match=message) as error:
        decode(signed(*edit(*parts(encode(make(small))))))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name, number, message", [
    ("target", float("nan"), "target must be finite"),
    ("value_outputs", float("inf"), "value_outputs must be finite"),
    ("metric_target", 0.0, "metric_target must not be all zero"),
    ("metric_target", -1.0, "energy .* must be positive"),
])  # fmt: skip
def test_hostile_numbers_with_a_valid_digest_are_refused(small, name, number, message):
    header, payload = parts(encode(make(small, target=torch.ones(16), metric_target=torch.ones(16)), torch.float32))
    begin, end = header[name]["data_offsets"]
    payload = payload[:begin] + struct.pack("<f", number) * ((end - begin) // 4) + payload[end:]
    with pytest.raises(ConceptFileError, match=message):
        decode(signed(header, payload))


def test_unknown_metadata_of_other_programs_is_ignored(small):
    concept = make(small)
    header, payload = parts(encode(concept, torch.float32))
    header["__metadata__"]["modelspec.hash_sha256"] = "0x00"
    assert same(decode(build(header, payload)), concept)


def test_what_safetensors_itself_refuses_is_a_concept_file_error(small, monkeypatch):
    data = encode(make(small))

    def fail(_):
        raise RuntimeError("no\x1b")

    monkeypatch.setattr(safetensors.torch, "load", fail)
    with pytest.raises(ConceptFileError, match=r"safetensors cannot read it: 'no.x1b'"):
        decode(data)


# Damage


@pytest.mark.parametrize("keys", [False, True], ids=["locked", "keys"])
def test_damaged_files_never_load_as_something_else(small, keys):
    """A few hundred random injuries: each is refused as ConceptFileError, or reads as the very same concept."""
    concept = make(small, keys=keys, recipe={"steps": 400, "lr": 0.03}, author="A", license="CC0-1.0", covariance="abc")
    data, rng = encode(concept, torch.float32), random.Random(0)
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    injured = []
    for _ in range(150):
        injured.append(data[: rng.randrange(len(data))])
    for region in (range(8), range(8, header_end), range(header_end, len(data))):
        for _ in range(150):
            copy = bytearray(data)
            for _ in range(rng.choice((1, 1, 1, 4))):
                copy[rng.choice(region)] ^= 1 << rng.randrange(8)
            injured.append(bytes(copy))
    for _ in range(150):
        at, size = rng.randrange(len(data)), rng.randrange(1, 40)
        injured.append(data[:at] + rng.randbytes(size) + data[at + rng.choice((0, size)) :])
    refused = 0
    for copy in injured:
        try:
            loaded = decode(copy)
        except ConceptFileError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert same(loaded, concept)
    assert refused > len(injured) * 0.9
