"""perfusion.concept_store: many concepts registered, few on the device, each in its place while it is in use."""

import shutil
import threading
import tracemalloc

import pytest
import torch

from perfusion import Concept, ConceptStore, Request
from perfusion.base import describe_base
from perfusion.concept_file import read_bytes
from perfusion.concept_index import IndexFileError
from perfusion.concept_store import ConceptUnavailable, StoreFull
from perfusion.handle import attach
from perfusion.prompts import PromptError
from perfusion.unet_concepts import Mention, UNetConcepts
from tests.perfusion.editing import draw, make_concept
from tests.perfusion.tiny import tiny_sd

IDS = ("alice/teddy", "bob/teddy", "carol/teapot")


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def base(pipe):
    return describe_base(pipe)


@pytest.fixture
def files(base, tmp_path):
    """id -> the file of a concept; alice's and bob's have the same superclass and name."""
    paths = {id: tmp_path / f"{number}.safetensors" for number, id in enumerate(IDS)}
    for seed, (id, path) in enumerate(paths.items(), 1):
        make_concept(base, id.partition("/")[2], seed=seed, unlocked=id == "carol/teapot").save(path)
    return paths


@pytest.fixture
def store(base, files):
    store = ConceptStore(base, capacity=2)
    assert store.register_all(files.items()) == {}
    yield store
    store.close()


def named(text, **names):
    return Request(text, names=names)


def test_two_tenants_own_the_same_name_in_one_batch(pipe, store, files):
    prompts = [named("a <teddy>", teddy="alice/teddy"), named("a <teddy>", teddy="bob/teddy"), "a cat"]
    with attach(pipe) as handle:
        handle.load(files["alice/teddy"], name="one"), handle.load(files["bob/teddy"], name="two")
        expected = draw(pipe, ["a <one>", "a <two>", "a cat"])
    with attach(pipe, store=store) as handle:
        assert torch.equal(draw(pipe, prompts), expected) and handle._engine.form == "slots"
        with pytest.raises(PromptError, match="no concept <teddy> is loaded"):
            draw(pipe, "a <teddy>")  # nobody's: only a request's names reach the store
        with pytest.raises(PromptError, match="names ask for a concept 'dave/teddy', which is not loaded"):
            draw(pipe, named("a <teddy>", teddy="dave/teddy"))


def test_concepts_of_the_store_and_loaded_ones_share_a_prompt(pipe, store, files):
    text = "a <teddy> next to a <pot>"
    with attach(pipe) as handle:
        handle.load(files["alice/teddy"], name="teddy"), handle.load(files["carol/teapot"], name="pot")
        expected = draw(pipe, text)
    with attach(pipe, store=store) as handle:
        handle.load(files["alice/teddy"], name="teddy")
        assert torch.equal(draw(pipe, named(text, pot="carol/teapot")), expected)
        with pytest.raises(ValueError, match="cannot share a prompt"):
            draw(pipe, named(text, pot="alice/teddy"))
    store = ConceptStore(describe_base(pipe), capacity=3)
    store.register_all(files.items())
    with UNetConcepts(pipe.unet, store=store) as concepts:
        encodings = torch.randn(2, 9, 16)
        concepts.request(encodings, [(Mention("bob/teddy"),), (Mention("alice/teddy"), Mention("carol/teapot"))])
        rows = concepts.keys_values(encodings)
        with UNetConcepts(pipe.unet) as other:
            for name, path in files.items():
                other.load(path, name.replace("/", "-"))
            same = encodings.clone()
            other.request(same, [(Mention("bob-teddy"),), (Mention("alice-teddy"), Mention("carol-teapot"))])
            assert all(map(torch.equal, rows, other.keys_values(same)))


def test_the_least_recently_used_leaves_and_the_pinned_stay(store):
    alice = store.lease(["alice/teddy"])
    store.lease(["bob/teddy"]).close()
    store.lease(["carol/teapot"]).close()
    assert store.resident() == ["alice/teddy", "carol/teapot"] and store.evictions == 1
    both = store.lease(["alice/teddy", "carol/teapot"])
    with pytest.raises(StoreFull, match="'bob/teddy' cannot be used: all 2 places on the device are in use"):
        store.lease(["bob/teddy"])
    both.close(), alice.close()
    with store.lease(["bob/teddy"]) as bob:
        assert "bob/teddy" in bob and store.resident() == ["carol/teapot", "bob/teddy"]


def test_encodings_keep_their_concepts_while_they_live(pipe, store):
    with UNetConcepts(pipe.unet, store=store) as concepts:

        def use(id):
            encodings = torch.randn(1, 9, 16)
            concepts.request(encodings, [(Mention(id),)])
            concepts.keys_values(encodings)
            return encodings

        alice = use("alice/teddy")
        use("bob/teddy")
        use("carol/teapot")
        assert store.resident() == ["alice/teddy", "carol/teapot"]
        del alice
        use("bob/teddy")
        assert store.resident() == ["carol/teapot", "bob/teddy"]


def test_a_prompt_keeps_its_concepts_from_its_encoding_to_its_picture(pipe, store):
    with attach(pipe, store=store):
        embeds = pipe.encode_prompt([named("a <teddy>", teddy="alice/teddy")], "cpu", 1, False)[0]
        store.lease(["bob/teddy"]).close(), store.lease(["carol/teapot"]).close()
        loads = store.loads
        draw(pipe, prompt_embeds=embeds, guidance_scale=1.0)
        assert store.loads == loads and "alice/teddy" in store.resident()


@pytest.mark.parametrize("fault", ["gone", "damaged", "exchanged", "no file"])
def test_a_broken_file_refuses_its_own_request_only(store, files, fault):
    path = files["bob/teddy"]
    if fault == "exchanged":
        shutil.copy(files["alice/teddy"], path)
    elif fault == "damaged":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    if fault == "no file":
        path.mkdir()
    reason = {"gone": "cannot be read", "damaged": "the digest must match", "exchanged": "another one than was registered", "no file": "not a regular"}
    requests = [["alice/teddy"], ["bob/teddy"], ["carol/teapot"]]
    outcomes = [store.prefetch(ids) for ids in requests]
    assert [each.exception() is None for each in outcomes] == [True, False, True]
    assert outcomes[1].exception().id == "bob/teddy" and reason[fault] in str(outcomes[1].exception())
    assert len(store._bank) == 2


def test_loading_stops_nobody_and_happens_once(base, files):
    begun, proceed, reads = threading.Event(), threading.Event(), []

    def read(location):
        reads.append(location)
        if location == str(files["bob/teddy"]) and len(reads) > 3:
            begun.set()
            assert proceed.wait(60)
        return read_bytes(location)

    store = ConceptStore(base, capacity=3, read=read)
    store.register_all(files.items())
    slow = [threading.Thread(target=store.lease, args=(["bob/teddy"],)) for _ in range(3)]
    for thread in slow:
        thread.start()
    assert begun.wait(60)
    assert store.lease(["alice/teddy", "carol/teapot"])["carol/teapot"].superclass == "teapot"  # while bob's is being read
    proceed.set()
    for thread in slow:
        thread.join(60)
    assert reads.count(str(files["bob/teddy"])) == 2 and store.loads == 3 and store.hits == 2  # to register it, and once for all three
    store.close()


def test_a_concept_that_is_exchanged_or_unregistered_stays_with_who_holds_it(store, base, files, tmp_path):
    held = store.lease(["alice/teddy"])
    before = held.place("alice/teddy")
    make_concept(base, "teddy", seed=9).save(tmp_path / "new.safetensors")
    store.register("alice/teddy", tmp_path / "new.safetensors")
    now = store.lease(["alice/teddy"])
    targets = store._bank.targets
    assert now.place("alice/teddy").slot != before.slot and not torch.equal(targets[now.place("alice/teddy").slot], targets[before.slot])
    store.unregister("alice/teddy")
    assert "alice/teddy" not in store and len(store) == 2
    with pytest.raises(StoreFull):
        store.lease(["bob/teddy"])
    held.close()
    assert store.lease(["bob/teddy"]).place("bob/teddy").slot == before.slot
    with pytest.raises(ConceptUnavailable, match="'alice/teddy' cannot be used: it is not registered"):
        store.lease(["alice/teddy"])


def test_what_cannot_be_registered_is_said_and_the_rest_is(base, files, tmp_path):
    other = tiny_sd(width=24)
    make_concept(describe_base(other), "teddy").save(tmp_path / "other.safetensors")
    store = ConceptStore(base)
    refused = store.register_all([*files.items(), ("a\nb", files[IDS[0]]), ("wide", tmp_path / "other.safetensors"), ("none", tmp_path / "none")])
    assert sorted(store) == sorted(IDS)
    assert "printable" in str(refused["a\nb"]) and "the text encoders have other widths" in str(refused["wide"])
    assert "No such file" in str(refused["none"]) and len(refused) == 3
    with pytest.raises(ConceptUnavailable, match="'none' cannot be used: its file cannot be read"):
        store.register("none", tmp_path / "none")
    with pytest.raises(ValueError, match="the store cannot be used here: its concepts are made for"):
        attach(other, store=store)


def test_an_index_survives_and_is_checked(base, files, tmp_path):
    path = tmp_path / "concepts.sqlite"
    store = ConceptStore(base, index=path)
    store.register_all(files.items())
    store.close()
    again = ConceptStore(base, index=path)
    assert sorted(again) == sorted(IDS) and again.lease(IDS)["bob/teddy"].superclass == "teddy"
    again.close()
    with pytest.raises(IndexFileError, match="another base model"):
        ConceptStore(describe_base(tiny_sd(width=24)), index=path)
    (tmp_path / "noise").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    with pytest.raises(IndexFileError, match="Give another file, or register the concepts anew"):
        ConceptStore(base, index=tmp_path / "noise")


def test_a_hundred_thousand_are_registered_and_ten_thousand_resident(base, tmp_path):
    """What it takes: places of the bank, the words of those that are resident, and some hundred bytes of index each."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(500)]
    for seed, path in enumerate(paths):
        make_concept(base, seed=seed).save(path)
    kept = {str(path): path.read_bytes() for path in paths}
    store = ConceptStore(base, capacity=10_000, dtype=torch.float16, read=kept.__getitem__)
    assert store.register_all((f"user-{number}/teddy", paths[number % 500]) for number in range(100_000)) == {} and len(store) == 100_000
    concepts = {path: Concept.from_bytes(data) for path, data in kept.items()}
    store._checked = lambda entry: (concepts[entry.location], entry.digest)  # reading the same files again and again proves nothing
    tracemalloc.start()
    lease = store.lease(f"user-{number}/teddy" for number in range(0, 100_000, 10))
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(store.resident()) == 10_000 and store.evictions == 0
    place = lease.place("user-4990/teddy")
    assert torch.equal(store._bank.targets[place.slot], concepts[str(paths[490])].target)
    memory = store.memory()
    width, outputs = base.encoding_dim, base.outputs
    assert memory["bank"] == 10_000 * (3 * width * 4 + 2 * outputs * 2)
    assert memory["words"] == 10_000 * width * 4 and memory["index"] < 100_000 * 200 and python < 10_000 * 4000
    lease.close()
    store.lease(["user-1/teddy"])
    assert len(store.resident()) == 10_000 and store.evictions == 1
    print(f"memory {memory}, python {python}")
