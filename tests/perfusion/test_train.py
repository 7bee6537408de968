"""perfusion.train as a user meets it: the folder it writes, going on after an interrupt, what it refuses, what comes out."""

import re

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from perfusion import models
from perfusion.base import UnsupportedPipeline
from perfusion.concept import Concept
from perfusion.handle import attach
from perfusion.training import checkpoints
from perfusion.training.session import TrainingSession
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import draw
from tests.perfusion.learning import assert_unchanged, covariance_of, learn, rows, same, snapshot, train_module, write_pictures
from tests.perfusion.pipeline_matrix import animatediff, ip_adapter
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("train") / "pictures", mask=True)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_sd()
    draw(pipe, "a teddy")  # transformers sets hooks of its own at the first call
    return pipe


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(train_module, "VALIDATION_STEPS", 1)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def interrupt_at(monkeypatch, step):
    """Ctrl-C at the worst moment of a step: the vectors have moved, the step is not over."""
    measure = TrainingSession._measure

    def measured(session, *args):
        if session.step == step:
            raise KeyboardInterrupt
        return measure(session, *args)

    monkeypatch.setattr(TrainingSession, "_measure", measured)


# The folder


def test_the_folder_holds_what_the_card_says(pipe, pictures, tmp_path):
    before = snapshot(pipe)
    concept = learn(
        pipe, pictures, output=tmp_path / "out", validation_every=2, checkpoint_every=1, checkpoint_limit=2, tensorboard=True,
        author="A | B <b>", license="CC: by", validation_prompts=("a {}",),
    )  # fmt: skip
    assert_unchanged(pipe, before)
    folder = tmp_path / "out"
    events = [name for name in names(folder) if name.startswith("tensorboard/")]
    assert names(folder) == sorted(
        ["README.md", "config.yaml", "gallery.png", "log.jsonl", "mine.safetensors", "references.png", *events]
        + ["checkpoints/step-000003.safetensors", "checkpoints/step-000004.safetensors"]
        + ["validation/step-000002.png", "validation/step-000004.png"]
    )
    assert len(events) == 1 and b"gate_on_word" in (folder / events[0]).read_bytes() and b"validation" in (folder / events[0]).read_bytes()

    card = (folder / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)]+)\)", card))
    assert linked == {"README.md", "gallery.png", "references.png", "config.yaml", "log.jsonl", "mine.safetensors"} - {"README.md"}
    assert all((folder / link).is_file() for link in linked)
    assert (
        "`<mine>`, one teddy" in card and 'license: "CC: by"' in card and "A \\| B &lt;b>" in card and "4 pictures, in 4 steps of 3" in card
    )
    assert f"{(folder / 'mine.safetensors').stat().st_size:,} bytes" in card and "{{" not in card and "{%" not in card
    assert 'load_pipeline("path/to/the/base/model")' in card and card.endswith(".\n")

    log = rows(folder)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert log[0].keys() == {
        "step",
        "loss",
        "gradient_norm",
        "gate_on_word",
        "gate_off_word",
        "superclass_cosine",
        "learning_rate",
        "word_learning_rate",
    }
    assert concept.recipe["steps"] == 4 and concept.recipe["pictures"] == 4 and concept.recipe["resolution"] == 16
    loaded = Concept.load(folder / "mine.safetensors")
    torch.testing.assert_close(loaded.value_outputs, concept.value_outputs, rtol=1e-3, atol=1e-3)
    assert (loaded.covariance, loaded.author, loaded.license) == (concept.covariance, "A | B <b>", "CC: by")


def test_the_card_of_the_built_in_model_names_it(pictures, tmp_path, monkeypatch):
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(models, "TOYBOX", tmp_path / "model")
    learn(models.load_pipeline("toybox", device="cpu"), pictures, output=tmp_path / "out", steps=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'load_pipeline("toybox")' in card and "in 1 step of 3" in card


def test_validation_is_the_same_each_time_and_changes_nothing(pipe, pictures, tmp_path):
    plain = learn(pipe, pictures)  # no folder, nothing written
    for name in ("one", "two"):
        torch.rand(len(name) + 1)  # whatever the global generator has come to
        assert same(plain, learn(pipe, pictures, output=tmp_path / name, validation_every=1))
    grids = [name for name in names(tmp_path / "one") if name.endswith(".png")]
    assert len(grids) == 4 + 2
    for name in grids:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# Going on


@pytest.mark.parametrize("options", [dict(batch_size=1), dict(batch_size=3), dict(batch_size=2, key_lock=False)], ids=str)
def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_been(pipe, pictures, tmp_path, monkeypatch, options):
    whole = learn(pipe, pictures, output=tmp_path / "whole", **options)
    before = snapshot(pipe)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            learn(pipe, pictures, output=tmp_path / "parts", **options)
    assert_unchanged(pipe, before)
    folder = tmp_path / "parts"
    assert checkpoints.latest(folder / "checkpoints").name == "step-000002.safetensors" and not (folder / "mine.safetensors").exists()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss"')  # as a killed run leaves it
    assert same(whole, learn(pipe, pictures, output=folder, resume="latest", **options))
    assert rows(folder) == rows(tmp_path / "whole") and [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert torch.equal(Concept.load(folder / "mine.safetensors").target, Concept.load(tmp_path / "whole" / "mine.safetensors").target)


def test_a_finished_run_says_so_and_goes_on_with_more_steps(pipe, pictures, tmp_path):
    whole = learn(pipe, pictures, steps=5)
    learn(pipe, pictures, steps=3, output=tmp_path, checkpoint_every=2)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ValueError, match="nothing is left to do: .*mine.safetensors' has had all 3 steps. Give more steps"):
        learn(pipe, pictures, steps=3, output=tmp_path, checkpoint_every=2, resume="latest")
    with pytest.raises(ValueError, match="holds a finished run of <mine>, step 3, .* its mine.safetensors, .*go on .* and more steps"):
        learn(pipe, pictures, steps=5, output=tmp_path)
    with pytest.raises(ValueError, match="is of step 3, beyond the 2 steps"):
        learn(pipe, pictures, steps=2, output=tmp_path, resume="latest")
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert same(whole, learn(pipe, pictures, steps=5, output=tmp_path, resume="latest"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_an_interrupt_while_the_gallery_is_drawn_keeps_the_run(pipe, pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learn(pipe, pictures, output=tmp_path)
    assert names(tmp_path) == ["checkpoints/step-000004.safetensors", "config.yaml", "log.jsonl", "mine.safetensors"]
    learn(pipe, pictures, output=tmp_path, resume="latest")
    assert (tmp_path / "README.md").is_file() and len(rows(tmp_path)) == 4
    (tmp_path / "README.md").unlink()  # as if the run had ended before the card was written
    learn(pipe, pictures, output=tmp_path, resume="latest")
    assert (tmp_path / "README.md").is_file()


def test_another_continuation_is_refused(pipe, pictures, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        learn(pipe, pictures, output=tmp_path / "out")
    kept = checkpoints.latest(tmp_path / "out" / "checkpoints")

    def refused(message, images=pictures, pipe=pipe, **options):
        before = names(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            learn(pipe, images, **{"output": tmp_path / "out", "resume": "latest", **options})
        assert names(tmp_path) == before

    refused(r"other settings \(batch_size 3 -> 2; flip 0.5 -> 0\)", batch_size=2, flip=0)
    refused(r"other settings \(pictures '\w+' -> '\w+'\)", images=sorted(pictures.glob("[0-2].png")))
    refused(r"model '\w+' -> '\w+'", pipe=tiny_sd(seed=1))
    refused("holds a run of <mine> that was not finished and stopped at step 1.* config.yaml, log.jsonl, checkpoints/.*go on", resume=None)
    refused("stopped at step 1.*folder, or say --overwrite .overwrite=True..$", resume=None, name="other")  # nothing to go on with
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("")
    refused("other' holds files that this run would replace: log.jsonl", resume=kept, output=tmp_path / "other")
    refused("no such checkpoint", resume=tmp_path / "none.safetensors")
    refused('resume="latest" needs an output folder', output=None)
    refused("there is no checkpoint to continue from in", output=tmp_path / "elsewhere")
    kept.write_bytes(kept.read_bytes()[:-1])
    refused("is damaged")


# Files that are there already


def test_nothing_that_is_there_is_replaced_unasked(pipe, pictures, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("somebody's")
    (folder / "notes.txt").write_text("somebody's")
    with pytest.raises(ValueError, match=r"out' holds files that this run would replace: README.md. Give another output folder, or"):
        learn(pipe, pictures, output=folder)
    assert names(folder) == ["README.md", "notes.txt"] and (folder / "README.md").read_text() == "somebody's"

    learn(pipe, pictures, output=folder, overwrite=True, checkpoint_every=2, validation_every=2, tensorboard=True)
    assert "<mine>" in (folder / "README.md").read_text() and (folder / "notes.txt").read_text() == "somebody's"
    with pytest.raises(ValueError, match="finished run of <mine>, step 4, and .* README.md, .*tensorboard/, validation/"):
        learn(pipe, pictures, output=folder, name="other")

    (folder / "checkpoints" / "step-notes.safetensors").write_text("somebody's")
    curves = set((folder / "tensorboard").iterdir())
    other = learn(pipe, pictures, output=folder, overwrite=True, name="other", steps=3, checkpoint_every=1, validation_every=1)
    found = set(names(folder))
    assert {"mine.safetensors", "other.safetensors", "checkpoints/step-notes.safetensors", "validation/step-000002.png"} <= found
    assert not {"checkpoints/step-000004.safetensors", "validation/step-000004.png"} & found and not curves & set(folder.rglob("*"))
    assert same(other, learn(pipe, pictures, name="other", steps=3)) and [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_what_is_overwritten_stays_until_its_replacement_is_there(pipe, pictures, tmp_path, monkeypatch):
    learn(pipe, pictures, output=tmp_path, checkpoint_every=2)
    old = (tmp_path / "mine.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            learn(pipe, pictures, output=tmp_path, overwrite=True, seed=1)
    assert (tmp_path / "mine.safetensors").read_bytes() == old and (tmp_path / "README.md").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(train_module, "_save", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            learn(pipe, pictures, output=tmp_path, resume="latest", seed=1)
    # all steps are done, and yet the concept is the other run's
    new = learn(pipe, pictures, output=tmp_path, resume="latest", seed=1)
    assert (tmp_path / "mine.safetensors").read_bytes() != old and same(new, learn(pipe, pictures, seed=1))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_found_before_the_pictures_are_read(pipe, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="/file is a file, and a folder is needed there. Choose another path"):
        learn(pipe, tmp_path / "no pictures", output=tmp_path / place)
    assert names(tmp_path) == ["file"]


# Refusals, before anything is written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"superclass": "zyx" * 6},
            "superclass 'zyx.*' is 18 tokens long; at most 16 are read as one. Give a shorter name",
        ),
        ({"name": "My Teddy"}, "name must be 1 to 32 characters"),
        ({"resolution": 17}, "resolution must be a multiple of 2"),
        ({"license": "x" * 65}, "license must be at most 64 bytes"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"resume": "latest"}, "there is no checkpoint"),
    ],
)
def test_settings_that_cannot_work(pipe, pictures, tmp_path, options, message):
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        learn(pipe, pictures, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert_unchanged(pipe, before)


def test_a_covariance_of_another_text_encoder(pipe, pictures):
    with pytest.raises(ValueError, match="covariance: it is of another text encoder than this pipeline's"):
        learn(pipe, pictures, covariance=covariance_of(tiny_sd(seed=1)))


def test_a_name_that_the_tokenizer_knows(pictures):
    pipe = tiny_sd()
    pipe.tokenizer.add_tokens("<mine>")
    with pytest.raises(ValueError, match="name 'mine' collides: the tokenizer has a word <mine> of its own"):
        learn(pipe, pictures)


def adapted():
    pipe = tiny_sd()
    ip_adapter(pipe)
    return pipe


def test_pipelines_that_cannot_be_trained(pictures, tmp_path):
    pipe = tiny_sd()
    with attach(pipe), pytest.raises(ValueError, match=r"attached, .* call perfusion.detach\(pipe\) first"):
        learn(pipe, pictures)
    with pytest.raises(UnsupportedPipeline, match="Img2Img.* starts from an image.*AutoPipelineForText2Image"):
        learn(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), pictures)
    for build, message in ((animatediff, "draws videos"), (adapted, "an IP-Adapter is loaded.*unload_ip_adapter")):
        with pytest.raises(UnsupportedPipeline, match=message):
            learn(build(), pictures)
    pipe._all_hooks = [object()]
    with pytest.raises(UnsupportedPipeline, match="offloads its models.*remove_all_hooks"):
        learn(pipe, pictures)
    pipe._all_hooks = []
    pipe.unet.mid_block._compiled_call_impl = pipe.unet.mid_block.forward  # what .compile() sets, without the compiler
    with pytest.raises(UnsupportedPipeline, match="already compiled"):
        learn(pipe, pictures)
    with pytest.raises(ValueError, match="is the folder of the training pictures"):
        learn(tiny_sd(), pictures, output=pictures)


# What comes out


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_saved_concept_draws_what_the_one_in_memory_draws(pictures, tmp_path, make):
    pipe = make()
    concept = learn(pipe, pictures, output=tmp_path, steps=6, learning_rate=0.3)
    assert len(concept.word_embeddings) == len(concept.base.text_widths)
    drawn = []
    for source in (concept, tmp_path / "mine.safetensors"):
        with attach(pipe) as handle:
            handle.load(source)
            drawn.append(draw(pipe, "a photo of a <mine>"))
    plain = draw(pipe, "a photo of a teddy")
    assert (drawn[0] - plain).abs().max() > 20 * (drawn[0] - drawn[1]).abs().max()
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=5e-3 * drawn[0].abs().max().item())


def test_what_validation_draws_is_what_attach_draws(pipe, pictures, tmp_path):
    concept = learn(pipe, pictures, output=tmp_path, validation_prompts=("a {} on a beach",))
    with attach(pipe) as handle:
        handle.load(concept)
        images = [
            pipe("a <mine> on a beach", num_inference_steps=1, generator=torch.Generator().manual_seed(seed)).images[0] for seed in (0, 1)
        ]
    sheet = train_module.contact_sheet.sheet(images)
    difference = max(abs(a - b) for a, b in zip(sheet.tobytes(), Image.open(tmp_path / "gallery.png").tobytes(), strict=True))
    assert difference <= 1


@pytest.mark.numeric
def test_sdxl_reads_pooled_text_and_sizes(pictures):
    pipe, seen = tiny_sdxl(), []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True)
    concept = learn(pipe, pictures, steps=2, instance_prompts="a {}")
    handle.remove()
    assert len(seen) == 2 and concept.value_outputs.shape == (concept.base.outputs,)
    with torch.no_grad():
        pooled = as_run(lambda: pipe.encode_prompt("a teddy", device="cpu", do_classifier_free_guidance=False)[2].expand(3, -1))
    assert_same_run(seen[0]["text_embeds"].detach(), pooled)
    assert seen[0]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
