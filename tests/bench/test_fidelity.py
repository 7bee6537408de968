"""The fidelity lab: prompts that say what they ask, scores that know true pictures, rows that resume, tables of rows alone."""

import json
import math

import pytest
import torch

from bench import rows
from bench.fidelity import judging, report, running
from bench.fidelity.extensions import Extended, Extension
from bench.fidelity.lab import Lab, folder_of
from bench.fidelity.learning import Recipe, squeezed
from bench.fidelity.methods import Base, Learned, Ours, overlaps_ignored
from bench.fidelity.prompts import Prompt, pair_prompts, prompts, triple_prompts
from bench.fidelity.real import LISTING, Scorer, ceiling, main, read_listing
from bench.fidelity.scale import SCALES
from bench.fidelity.sections import SECTIONS, Job, jobs, pairs
from bench.fidelity.subjects import targets
from perfusion import Concept
from perfusion.edit import RowSettings, Tables, edit_encodings
from perfusion.toybox.render import render
from perfusion.toybox.words import COLOURS, OBJECTS, PATTERNS, RELATIONS
from perfusion.toybox.world import sample_instances, sample_pictures
from tests.perfusion.learning import write_pictures
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.bench


def test_the_things_are_what_the_lab_promises():
    found = targets()
    assert len(found) >= 12 and {each.subject.superclass for each in found} == set(OBJECTS)
    assert any(each.pictures == 1 for each in found) and {each.subject.pattern for each in found} == set(PATTERNS)
    names = {each.name: each for each in found}
    twins = [each for each in found if each.twin]
    assert len(twins) >= 4
    for one in twins:
        other = names[one.twin]
        assert (one.subject.superclass, one.subject.colour, one.subject.pattern) == (
            other.subject.superclass, other.subject.colour, other.subject.pattern,
        )  # fmt: skip
        assert one.subject.attributes != other.subject.attributes


@pytest.mark.parametrize("target", targets()[:4], ids=lambda target: target.name)
def test_a_prompt_asks_for_what_it_says(target):
    full = prompts(target.subject, SCALES["full"].prompts)
    assert len({each.text for each in full}) == len(full) >= 20
    assert {each.kind for each in full} == {"scene", "relation", "colour", "style", "count", "pattern"}
    for prompt in full:
        assert prompt.text.count("{}") == 1 and "[" not in prompt.text
        words = prompt.text.split()
        if "relation" in prompt.asked:
            assert RELATIONS[prompt.asked["relation"]] in prompt.text and OBJECTS[prompt.asked["other"]] in words
            assert OBJECTS[prompt.asked["other"]] != target.subject.superclass
        if "colour" in prompt.asked:
            assert list(COLOURS)[prompt.asked["colour"]] in words and list(COLOURS)[prompt.asked["colour"]] != target.subject.colour
        if "pattern" in prompt.asked:
            assert PATTERNS[prompt.asked["pattern"]] in words and PATTERNS[prompt.asked["pattern"]] != target.subject.pattern
    assert all(each.text.count("{}") == 2 and each.asked["relation"] for each in pair_prompts(8))
    assert all(each.text.count("{}") == 3 and "relation" not in each.asked for each in triple_prompts(8))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(SCALES["smoke"], tmp_path_factory.mktemp("lab"))


def test_true_pictures_score_one_and_others_do_not(lab):
    """By other seeds than the yardstick's own: cars of any words, low; a twin of the same words, told apart; another class, not seen."""
    every = {each.name: each for each in targets()}
    car, twin, stranger = every["car"].subject, every["other-car"].subject, next(t.subject for t in targets() if t.name == "robot")
    asked = [Prompt("a {} on the beach", "scene", {})] * judging.TRUE
    cars = sample_instances(judging.TRUE, torch.Generator().manual_seed(5), "car")
    plain = dict(relation=torch.zeros(judging.TRUE, dtype=torch.long), style=torch.zeros(judging.TRUE, dtype=torch.long))
    any_cars = render(sample_pictures(judging.TRUE, torch.Generator().manual_seed(6), first=cars, **plain))[0]
    low = judging.similarities(lab.judge, car, asked, any_cars)
    own = judging.similarities(lab.judge, car, asked, judging.true_set(car, "alone", 77))
    scored = judging.identities(lab.judge, car, asked, own, low)
    assert judging.spread([scored])[0] == pytest.approx(1, abs=0.05) and judging.spread([low])[0] < 0.7
    for one, other in ((car, twin), (twin, car)):
        assert judging.spread([judging.apart(lab.judge, one, other, asked, judging.true_set(one, "alone", 78))])[0] > 0.8
    seen = judging.check(lab.judge, [stranger.superclass], asked, judging.true_set(car, "alone", 79))
    assert judging.spread([seen["object"]])[0] < 0.1


def test_intervals():
    assert judging.spread([[1.0, None, 1.0]]) == (1.0, 1.0, 1.0)
    middle, low, high = judging.spread([[0.0, 1.0] * 20])
    assert middle == 0.5 and 0.3 < low < 0.42 and 0.58 < high < 0.7
    # four things that differ: the interval is of things, wider than that of their pictures
    things = [[0.0] * 50, [1.0] * 50, [0.0] * 50, [1.0] * 50]
    assert judging.spread(things)[1] <= 0.25 and judging.spread([sum(things, [])])[1] > 0.4
    assert math.isnan(judging.spread([[None]])[0])


def test_rows_are_made_once_and_resume(lab, tmp_path):
    file, told = tmp_path / "rows.jsonl", []
    every = [
        Job("concepts", Base(), targets()[:2], 2, 1), Job("concepts", Ours("perfusion"), targets()[:2], 2, 1),
        Job("pairs", Ours("gates by word", settings={"gate": "word"}), targets()[:2], 1, 1, pair=True),
    ]  # fmt: skip
    assert running.make(lab, every[:1], file, tell=told.append) == 0
    todo = running.missing(lab, every, file)
    assert todo == every[1:]
    assert running.make(lab, todo, file, until=0.0, tell=told.append) == 2 and len(rows.read(file)) == 2
    assert running.make(lab, todo, file, tell=told.append) == 0
    assert running.missing(lab, every, file) == []
    lines = rows.read(file)
    assert [line["subject"] for line in lines] == ["teddy", "teapot", "teddy", "teapot", "teddy + teapot"]
    assert all(line["toybox"] == lab.digest and len(line["scores"]["text"]) in (1, 2) for line in lines)
    assert lines[0]["scores"]["identity"] == pytest.approx([0, 0], abs=1e-3) and lines[2]["bytes"] < 32_000
    assert {"both", "identity of the first", "identity of the second", "both and like"} <= lines[4]["scores"].keys()
    tables = report.refreshed("<!-- fidelity: concepts -->\n<!-- end of fidelity -->", report.current(lines))
    assert "| teapot |" in tables and "| **all** |" in tables


def test_tables_say_how_much_each_row_rests_on():
    """Each method at its largest scale; other weights and another guidance are left out; of a row made twice the last counts."""

    def row(variant, scale, identity, *, subject="teddy", guidance=2.5, toybox="new"):
        scores = {"identity": [identity] * 2, "text": [1.0] * 2}
        kept = {"steps": 1, "batch": 1, "sampling_steps": 1, "guidance": guidance}
        facts = {"subject": subject, "prompts": 2, "seeds": 1, "bytes": 9, "settings": kept}
        section = "concepts" if variant == "perfusion" else "peers"
        return {"section": section, "variant": variant, "scale": scale, "toybox": toybox, "scores": scores, **facts}

    found = report.current([
        row("perfusion", "full", 0.1, toybox="old"), row("perfusion", "full", 0.2, guidance=4.0), row("LoRA, rank 4", "small", 0.3),
        row("perfusion", "small", 0.4), row("perfusion", "full", 0.5), row("perfusion", "full", 0.6),
        row("perfusion", "full", 0.6, subject="teapot"),
    ])  # fmt: skip
    said = [(each["variant"], each["scores"]["identity"][0]) for each in found]
    assert said == [("perfusion", 0.6), ("perfusion", 0.6), ("LoRA, rank 4", 0.3)]
    short = report.text_of("in short", found)
    assert "| **perfusion** | 1 × 2 × 1 |" in short and "| LoRA, rank 4 | 1 × 2 × 1, small |" in short  # on the things that they share
    held = report.text_of("goals", found)
    assert "| ahead of LoRA, rank 4, picture by picture | identity +0.30 (+0.30 to +0.30), text +0.00 (+0.00 to +0.00) | in identity |" in held


def test_methods_are_compared_on_the_same_pictures():
    """A row of more prompts and seeds is cut to the first of them, prompt by prompt; of things that others have not, nothing is left."""

    def row(subject, prompts, seeds, identity):
        return {"subject": subject, "prompts": prompts, "seeds": seeds, "scores": {"identity": identity}}

    few = [row("teddy", 2, 1, [0.5, 0.5])]
    (cut,) = report.on_pictures_of(few, [row("teddy", 3, 2, [1, 2, 3, 4, 5, 6]), row("mug", 3, 2, [0] * 6)])
    assert (cut["prompts"], cut["seeds"], cut["scores"]["identity"]) == (2, 1, [1, 3])
    assert report.on_pictures_of([row("teddy", 4, 1, [0] * 4)], few) == few  # what was not drawn cannot be shown
    assert report.current([few[0] | KEPT, row("teddy", 3, 2, [0] * 6) | KEPT, few[0] | KEPT])[0]["prompts"] == 3


KEPT = {"section": "peers", "variant": "OFT", "scale": "full", "toybox": "new", "settings": {"guidance": 2.5}}


def test_a_picture_does_not_depend_on_what_shares_its_batch(lab):
    texts, seeds = ["a teddy on the beach", "a red car at night", "a mug in a room"], [5, 6, 7]
    together = lab.draw(texts, seeds)
    assert torch.allclose(together[1:2], lab.draw(texts[1:2], seeds[1:2]), atol=1e-3)


def test_the_approximation_ignores_overlaps_and_is_undone():
    """With a_j = c_j overlaps are subtracted twice; one concept alone is the same in both."""
    generator = torch.Generator().manual_seed(0)
    targets_ = torch.randn(2, 8, generator=generator)
    targets_[1] += targets_[0]
    tables = Tables(targets_, targets_, torch.randn(2, 8, generator=generator), torch.randn(2, 4, generator=generator))

    def edited(index):
        ones = torch.ones(1, len(index))
        return edit_encodings(targets_[:1].expand(3, 8)[None], tables, RowSettings(torch.tensor([index], dtype=torch.int32), ones, ones, ones)).values

    exact, alone = edited([0, 1]), edited([0])
    with overlaps_ignored():
        approximate, same = edited([0, 1]), edited([0])
    assert torch.allclose(alone, same, atol=1e-5) and torch.equal(edited([0, 1]), exact)
    assert exact.abs().max() < 1e-4 < 0.1 < approximate.abs().max()  # e = i*: the exact projection leaves nothing of it


def test_scaled_layers_are_drawn(lab):
    """A strength per layer changes the picture, and 1 everywhere does not."""
    target = targets()[0]
    images = []
    for scales in ({}, {"coarse": 1.0, "fine": 1.0}, {"coarse": 3.0, "fine": 1.0}):
        method = Ours("layers", Recipe(), scales=scales)
        with method.applied(lab, [method.learn(lab, target)]) as applied:
            images.append(lab.draw([applied.prompt("a {} on the beach", 0)], [1]))
    assert torch.equal(images[0], images[1]) and not torch.allclose(images[0], images[2], atol=1e-2)


def test_extensions_are_learned_and_drawn(lab):
    """Nothing extended is our concept as the engine draws it; each extension trains more, or draws otherwise."""
    target, texts = targets()[0], ["a {} on the beach", "a {} at night"]

    def drawn(method):
        learned = method.learn(lab, target)
        with method.applied(lab, [learned]) as applied:
            return lab.draw([applied.prompt(text, 0) for text in texts], [1, 2], applied.pipe), learned.facts

    own, facts = drawn(Ours("perfusion"))
    for more, changes in (
        (0, {}), (0, {"biases": (0.7, 0.7)}), (0, {"biases": (0.2, 1.0)}), (96, {"words": 2}), (896, {"rank": 2}), (0, {"value_noise": "late"}),
    ):  # fmt: skip
        images, found = drawn(Extended("extended", Extension(**changes)))
        if not changes:
            plain = images
            assert torch.allclose(plain, own, atol=8e-3)  # but for the half precision of a file
        assert ((images - plain).abs().max() < 1e-5) == (changes in ({}, {"biases": (0.7, 0.7)})), changes
        assert found["trained"] == facts["trained"] + more
        assert found["bytes"] == facts["bytes"] + 2 * more


def test_noise_of_a_training_is_drawn_as_it_says():
    scheduler = lab_scheduler()
    even = torch.arange(1000)
    late, early = squeezed(even, scheduler, "late"), squeezed(even, scheduler, "early")
    assert (late.min(), late.max(), early.min(), early.max()) == (333, 999, 0, 666)
    counted = torch.bincount(squeezed(even.repeat(200), scheduler, "snr"), minlength=1000).double()
    ratio = scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())
    weight = ratio.clamp(max=5) / (ratio + 1)
    share = (weight / weight.sum()).view(10, 100).sum(1)
    assert torch.allclose(counted.view(10, 100).sum(1) / counted.sum(), share, atol=0.01)


def lab_scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def test_every_peer_learns_draws_and_says_what_it_costs(lab):
    """Two steps each: files, counts and a picture; or a reason."""
    from bench.fidelity.peers import Absent, peers

    target, heard = targets()[0], {}
    for method in peers():
        try:
            learned = method.learn(lab, target)
        except Absent as error:
            heard[method.name] = str(error)
            continue
        assert isinstance(learned, Learned) and {"seconds", "steps", "bytes", "trained", "memory"} <= learned.facts.keys(), method.name
        assert learned.facts["bytes"] > 100 and learned.facts["memory"] > 1e5
        small = ("Textual Inversion", "our concept as a LoRA of rank 1", "perfusion-pytorch's module")
        assert (learned.facts["trained"] > 10_000) == (method.name not in small), method.name
        with method.applied(lab, [learned]) as applied:
            assert lab.draw([applied.prompt("a {} on the beach", 0)], [1], applied.pipe).isfinite().all(), method.name
    assert heard.keys() <= {"SVDiff", "perfusion-pytorch's module"} and all(len(reason) > 20 for reason in heard.values())


def test_jobs_of_every_scale():
    for scale in SCALES.values():
        found = list(jobs(scale))
        assert {job.section for job in found} == set(SECTIONS)
        names = [(job.section, job.method.name, job.targets) for job in found]
        assert len(names) == len(set(names))
    assert all(a.subject.superclass != b.subject.superclass for a, b in pairs(SCALES["full"]))


def test_other_models_are_refused(tmp_path):
    tiny_sd().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no judge"):
        folder_of(str(tmp_path))


@pytest.mark.smoke
def test_the_page_is_of_the_shipped_rows():
    assert report.stale(report.current(rows.read(report.ROWS))) == [], "python -m bench.fidelity.report"


# real checkpoints

LISTED = """Classes

subject_name,class
mine,teddy
pet,dog

Prompts

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
"a {0} {1} wearing a red hat".format(unique_token, class_token),
]
"""


def test_the_benchmarks_listing():
    classes, found = read_listing(LISTED)
    assert classes == {"mine": "teddy", "pet": "dog"}
    assert found == {"object": ["a {} in the jungle", "a red {}"], "live": ["a {} wearing a red hat"]}
    with pytest.raises(ValueError, match="both lists"):
        read_listing("subject_name,class\nmine,teddy\n")


def test_real_checkpoints_end_to_end(tmp_path, capsys):
    """A tiny pipeline, CLIP and ViT of random weights: rows of the subject, once; a real picture is most like itself."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    pipe = tiny_sd()
    size = len(pipe.tokenizer)
    clip = CLIPConfig(text_config={**small, "vocab_size": size, "eos_token_id": size - 1}, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    pipe.tokenizer.save_pretrained(tmp_path / "clip")
    ViTModel(ViTConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dino")
    pipe.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    write_pictures(data / "mine")
    (data / LISTING).write_text(LISTED)
    given = [*("--model", tmp_path / "model", "--data", data, "--clip", tmp_path / "clip", "--dino", tmp_path / "dino")]
    given += ["--subjects", 1, "--steps", 1, "--train-steps", 1, "--device", "cpu", "--out", tmp_path / "rows.jsonl", "--work", tmp_path / "work"]
    given = [str(each) for each in given]
    assert main(given) == 0
    first = (tmp_path / "rows.jsonl").read_text()
    assert main(given) == 0 and (tmp_path / "rows.jsonl").read_text() == first
    found = [json.loads(line) for line in first.splitlines()]
    assert [row["variant"] for row in found] == ["real pictures", "class word", "perfusion"]
    assert len(found[2]["scores"]["CLIP-T"]) == 2 * 4 and found[2]["scores"].keys() == {"CLIP-I", "DINO", "CLIP-T"}
    assert "| perfusion |" in capsys.readouterr().out
    assert Concept.load(next((tmp_path / "work").rglob("mine.safetensors"))).superclass == "teddy"
    with pytest.raises(SystemExit, match="--clip"):
        main(given[:4])
    scorer = Scorer(None, str(tmp_path / "dino"), torch.device("cpu"))
    from PIL import Image

    one = Image.open(data / "mine" / "0.png").convert("RGB")
    assert ceiling(scorer.images([one, one]))["DINO"] == pytest.approx([1, 1], abs=1e-3)
