"""perfusion.concept_file.decoding: what reading a foreign, hostile or damaged file survives."""

import json
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch

from perfusion.base import describe_base
from perfusion.concept import Concept
from perfusion.concept_file import ConceptFileError
from perfusion.concept_file.encoding import encode
from perfusion.concept_file.format import digest
from tests.perfusion.concepts import make, same
from tests.perfusion.tiny import tiny_sd


@pytest.fixture(scope="module")
def small():
    return describe_base(tiny_sd())


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
    header["__metadata__"]["perfusion.digest"] = digest(header["__metadata__"], tensors)
    return build(header, payload)


def test_signing_as_the_tests_do_it_is_valid(small):
    concept = make(small)
    assert same(Concept.from_bytes(signed(*parts(encode(concept, torch.float32)))), concept)


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
    assert Concept.from_bytes(build(text.ljust(size), payload)).name == "my-teddy"


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
        (tensor("word_embedding", shape=[17]), "word_embedding must span 17 numbers"),
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
        Concept.from_bytes(build(*edit(*parts(encode(make(small))))))


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
        Concept.from_bytes(signed(*edit(*parts(encode(make(small))))))
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
        Concept.from_bytes(signed(header, payload))


def test_unknown_metadata_of_other_programs_is_ignored(small):
    concept = make(small)
    header, payload = parts(encode(concept, torch.float32))
    header["__metadata__"]["modelspec.hash_sha256"] = "0x00"
    assert same(Concept.from_bytes(build(header, payload)), concept)


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
            loaded = Concept.from_bytes(copy)
        except ConceptFileError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert same(loaded, concept)
    assert refused > len(injured) * 0.9
