"""`perfusion.export` and `perfusion.runtime`: exported models draw the pictures of the pipelines they came from."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import perfusion
from perfusion import cli
from perfusion.base import describe_base
from perfusion.exporting import ExportError, folder, writers
from perfusion.exporting.scheduler import read_schedule
from perfusion.families import CUSTOM, FAMILIES
from perfusion.prompts import PromptError
from perfusion.runtime import Concept, ExportedFolderError, Request, Runtime
from perfusion.runtime.manifest import MANIFEST, Manifest, digest
from tests.kernels.tolerance import Exact, as_run, assert_same_run
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import SMALL, tiny_sd, tiny_sdxl

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.export

STEPS = 3
# a row without a concept, several concepts in a row, settings in the prompt, keys without the lock, a concept in the negative prompt
PROMPTS = ["a photo of a <teddy> on a beach", "a <teddy:0.5> and <teapot|bias=0.5> on a <mug>", "a cat", "<mug> in the sea"]
NEGATIVES = ["dark", "a <teapot>", "", "bright"]
ONE_LEVEL = dict(SMALL, block_out_channels=(16,), transformer_layers_per_block=(2,))  # `sd` has an UNet of several
PIPELINES = {"sd": tiny_sd, "sdxl": functools.partial(tiny_sdxl, unet=ONE_LEVEL)}


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="perfusion")


@pytest.fixture(scope="module")
def pipelines():
    return {kind: make() for kind, make in PIPELINES.items()}


@pytest.fixture(scope="module")
def concepts(pipelines):
    names = ("teddy", "teapot", "mug")
    return {
        kind: [make_concept(describe_base(pipe), name, seed=seed, unlocked=name == "mug") for seed, name in enumerate(names, 1)]
        for kind, pipe in pipelines.items()
    }


@pytest.fixture(scope="module")
def exported(pipelines, tmp_path_factory):
    """kind -> folder, written when it is first asked for: SDXL by Python, the other one by the command."""
    folders = {}

    def export(kind):
        if kind not in folders:
            pipe, path = pipelines[kind], tmp_path_factory.mktemp("export")
            folders[kind] = path / "exported"
            if kind == "sd":
                pipe.save_pretrained(path / "model")
                written = run("export", path / "model", folders[kind])
                assert written.exit_code == 0 and "Largest difference from torch" in written.stdout, written.output
            else:
                processors = {name: id(each) for name, each in pipe.unet.attn_processors.items()}
                perfusion.export(pipe, folders[kind])
                assert {name: id(each) for name, each in pipe.unet.attn_processors.items()} == processors
        return folders[kind]

    return export


@pytest.fixture(scope="module")
def sd(exported, concepts):
    runtime = Runtime(exported("sd"), threads=1)
    for concept in concepts["sd"]:
        runtime.load(Concept.of(concept))
    return runtime


def pictures(runtime, requests, **options):
    return runtime.decode(runtime.sample(requests, steps=STEPS, **options)).transpose(0, 2, 3, 1)


def draw(pipe, prompts, negatives, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    result = pipe(prompts, negative_prompt=negatives, num_inference_steps=STEPS, generator=generators, output_type="np", **options)
    return result.images


def requests(**options):
    return [Request(prompt=p, negative_prompt=n, seed=s, **options) for s, (p, n) in enumerate(zip(PROMPTS, NEGATIVES))]


@pytest.fixture(scope="module")
def alike(pipelines, concepts):
    """Compares pictures of `sd` that runtimes draw: to what such pictures move in torch."""
    with perfusion.attach(pipelines["sd"]) as handle:
        for concept in concepts["sd"]:
            handle.load(concept)
        scale = as_run(lambda: draw(pipelines["sd"], PROMPTS, NEGATIVES, guidance_scale=6.0)).scale.max()

    def compare(mine, other):
        other = torch.from_numpy(np.ascontiguousarray(other)).double()
        assert_same_run(mine, Exact(other, scale.expand_as(other)))

    return compare


@pytest.mark.numeric
@pytest.mark.parametrize("key_lock", ["local", "global"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_pictures_are_the_pipelines(kind, key_lock, exported, pipelines, concepts):
    runtime = Runtime(exported(kind), threads=1)
    for concept in concepts[kind]:
        runtime.load(Concept.of(concept))
    with perfusion.attach(pipelines[kind]) as handle:
        for concept in concepts[kind]:
            handle.load(concept)
        for each in (runtime, handle):
            each.set("teapot", key_lock=key_lock)
            each.set("teddy", temperature=0.3)
        theirs = as_run(lambda: draw(pipelines[kind], PROMPTS, NEGATIVES, guidance_scale=6.0))
        plain = draw(pipelines[kind], ["a cat"] * 4, NEGATIVES, guidance_scale=6.0)
    assert_same_run(pictures(runtime, requests()), theirs)
    assert np.abs(theirs.value.numpy() - plain).max((1, 2, 3))[[0, 1, 3]].min() > 0.02, "these pictures would show a missing edit"


@pytest.mark.numeric
@pytest.mark.parametrize("kind", PIPELINES)
def test_sizes_and_no_guidance(kind, exported, pipelines):
    """Height and width other than the exported ones; without guidance there are no negative rows. SDXL's sizes are inputs."""
    runtime = Runtime(exported(kind), threads=1)
    for scale in (1.0, 4.0):
        mine = pictures(runtime, [Request(prompt="a cat", negative_prompt=None, guidance_scale=scale)], height=8, width=24)
        theirs = as_run(lambda: draw(pipelines[kind], ["a cat"], None, guidance_scale=scale, height=8, width=24))
        assert mine.shape == (1, 8, 24, 3)
        assert_same_run(mine, theirs)


@pytest.mark.numeric
def test_a_batch_is_its_single_pictures(sd, alike):
    """Each with its own guidance, settings and seed; and 70 rows at once."""
    mixed = [
        *requests(),
        Request(prompt="a <teddy>", guidance_scale=1.0, seed=8),
        Request(prompt="a <teddy>", seed=8, bias=[0.9, 0.1], strength={"teddy": lambda step: 1.5 - step / 2}),
    ]
    together = pictures(sd, mixed)
    for one, picture in zip(mixed, together):
        alike(pictures(sd, [one])[0], picture)
    assert np.abs(together[4] - together[5]).max() > 0.02
    many = pictures(sd, [mixed[0]] * 35)
    alike(many, np.broadcast_to(together[:1], many.shape))


@pytest.mark.numeric
def test_two_users_own_one_name(exported, concepts, alike):
    """Names are resolved per request."""
    teddy, teapot, _ = map(Concept.of, concepts["sd"])
    runtime = Runtime(exported("sd"), threads=1)
    runtime.load(teddy, "anna-teddy")
    runtime.load(teapot, "ben-teddy")
    both = [Request(prompt="a <teddy>", names={"teddy": f"{user}-teddy"}) for user in ("anna", "ben")]
    mine = pictures(runtime, both)
    alone = Runtime(exported("sd"), threads=1)
    alone.load(teapot, "teddy")
    alike(pictures(alone, [Request(prompt="a <teddy>")])[0], mine[1])
    assert np.abs(mine[0] - mine[1]).max() > 0.02
    with pytest.raises(ValueError, match="no concept named 'cat-teddy' is loaded; loaded are: anna-teddy, ben-teddy"):
        runtime.prepare([Request(prompt="a <teddy>", names={"teddy": "cat-teddy"})])


def test_strength_0_is_the_superclass(sd):
    mine = pictures(sd, [Request(prompt="a <teddy:0>"), Request(prompt="a teddy")])
    np.testing.assert_array_equal(*mine)


@pytest.mark.numeric
def test_requests_are_the_pipelines(sd, pipelines, concepts):
    """What a request sets beside its prompt: gates by word, a schedule, the global lock, for one concept or all; against the same in torch."""
    prompt = "a <teddy> and a <teapot>"
    several = [dict(gate="word"), dict(bias=[0.9, 0.1]), dict(strength={"teddy": lambda step: 1.5 - step / 2}), dict(key_lock="global"), {}]
    mine = pictures(sd, [Request(prompt=prompt, seed=seed, **each) for seed, each in enumerate(several)])
    with perfusion.attach(pipelines["sd"]) as handle:
        for concept in concepts["sd"]:
            handle.load(concept)
        asked = [perfusion.Request(prompt, **each) for each in several]
        theirs = as_run(lambda: draw(pipelines["sd"], asked, [""] * 5, guidance_scale=6.0))
    assert_same_run(mine, theirs)
    alike = pictures(sd, [Request(prompt=prompt, seed=0, **each) for each in several])
    assert np.abs(alike[:4] - alike[4]).max((1, 2, 3)).min() > 1e-3, "these pictures would show what is left out"


def test_other_functions_for_the_graphs(exported, sd):
    """As for another runtime: a batch's keys and values, and a sampler that calls a function."""
    calls = []

    def unet(**arrays):
        calls.append({name: array.shape for name, array in arrays.items()})
        return sd.graphs["unet"](**arrays)

    runtime = Runtime(exported("sd"), graphs={**sd.graphs, "unet": unet})
    one = [Request(prompt="a cat")]
    np.testing.assert_array_equal(pictures(runtime, one), pictures(sd, one))
    outputs = runtime.manifest.base.outputs
    assert calls == [{"sample": (2, 4, 8, 8), "timestep": (2,), "key": (2, 77, outputs), "value": (2, 77, outputs)}] * STEPS


@pytest.mark.numeric
@pytest.mark.smoke
def test_torch_export_programs(tmp_path, pipelines, concepts, alike):
    """pt2 files are loaded by the user's own call only; they draw the pipeline's pictures, 63 rows at a time."""
    pipe, concept = pipelines["sd"], concepts["sd"][0]
    result = perfusion.export(pipe, tmp_path / "pt2", format="pt2")
    assert result.differences.keys() == set(result.manifest.graphs), "each file is compared with torch"
    with pytest.raises(ExportedFolderError, match="never loaded from here. Export with --format onnx, or give functions"):
        Runtime(result.folder)

    def function(name):
        program = torch.export.load(result.folder / f"{name}.pt2").module()

        def run(**arrays):
            with torch.no_grad():
                found = program(**{key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()})
            return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]

        return run

    runtime = Runtime(result.folder, graphs={name: function(name) for name in result.manifest.graphs})
    runtime.load(Concept.of(concept))
    several = [Request(prompt="a <teddy>", seed=seed, guidance_scale=6.0) for seed in range(33)]
    with perfusion.attach(pipe) as handle:
        handle.load(concept)
        alike(pictures(runtime, several), draw(pipe, ["a <teddy>"] * 33, [""] * 33, guidance_scale=6.0))


@pytest.mark.proof
def test_a_compiled_package(tmp_path):
    """AOTInductor makes machine code of the UNet, for any number of rows, where there is a C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    pipe = tiny_sd(unet=SMALL)
    module = folder.UNetGraph(pipe.unet)
    with module.installed():
        graph = folder.unet_graph(pipe, module)
        assert writers.write_package(graph, graph.export(), tmp_path / "unet.aoti.pt2") <= writers.TOLERANCE[torch.float32]


def test_a_wrong_graph_is_not_kept(tmp_path, monkeypatch):
    """What is compared is the file: a writer that changes a weight is found out, and leaves nothing."""
    pipe = tiny_sd(unet=SMALL)
    save = torch.export.save

    def wrong(program, path):
        save(program, path)
        with torch.no_grad():
            next(iter(program.state_dict.values())).add_(0.5)
        monkeypatch.setattr(torch.export.ExportedProgram, "module", lambda self: lambda **inputs: torch.zeros(1))

    monkeypatch.setattr(torch.export, "save", wrong)
    with pytest.raises(ExportError, match="the exported text_encoder differs from the model"):
        perfusion.export(pipe, tmp_path / "out", format="pt2")
    assert list(tmp_path.iterdir()) == []


# what is refused


def obstacle(change, match):
    return pytest.param(change, match, id=match.split(".")[0][:30])


def quantise(pipe):
    weight = pipe.unet.conv_in.weight
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)


def mixed(pipe):
    pipe.unet.conv_out.half()


def freeu(pipe):
    pipe.enable_freeu(1, 1, 1, 1)


def lcm(pipe):
    pipe.unet.register_to_config(time_cond_proj_dim=8)


def compiled(pipe):
    pipe.unet.compile()


def mask(pipe):
    pipe.text_encoder.config.use_attention_mask = True


def own_processor(pipe):
    class Mine:
        pass

    next(module for name, module in pipe.unet.named_modules() if name.endswith("attn1")).processor = Mine()


def offloaded(pipe):
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight.to("meta"), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        obstacle(lambda pipe: perfusion.attach(pipe), "perfusion is attached to it. Call perfusion.detach"),
        obstacle(quantise, "conv_in.weight of its unet is quantised"),
        obstacle(mixed, "its unet mixes number formats"),
        obstacle(lambda pipe: pipe.unet.to(torch.bfloat16), r"is torch.bfloat16. Load it with torch_dtype=torch.float32"),
        obstacle(offloaded, "is offloaded"),
        obstacle(freeu, "FreeU is on"),
        obstacle(lcm, "a distilled guidance scale"),
        obstacle(compiled, "a part of it is compiled"),
        obstacle(mask, "reads a padding mask"),
        obstacle(own_processor, "has a processor of its own .Mine."),
        obstacle(lambda pipe: setattr(pipe, "vae", None), "it has no VAE"),
    ],
)
def test_what_cannot_be_exported(change, match, tmp_path):
    pipe = tiny_sd(unet=SMALL)
    change(pipe)
    with pytest.raises(ExportError, match=match):
        perfusion.export(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_lora_is_fused_first(tmp_path):
    pipe = tiny_sd(unet=SMALL)
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"]))
    with pytest.raises(ExportError, match=r"a LoRA is loaded in its unet .*Call pipe.fuse_lora\(\) and then pipe.unload_lora_weights"):
        perfusion.export(pipe, tmp_path / "out")


def test_inpainting_models_are_refused(tmp_path):
    with pytest.raises(ExportError, match="takes 9 channels and gives 4 .as for inpainting"):
        perfusion.export(tiny_sd(unet={**SMALL, "in_channels": 9}), tmp_path / "out")


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (diffusers.UniPCMultistepScheduler(), "a UniPCMultistepScheduler cannot be exported; supported are DDIMScheduler, PND"),
        (
            diffusers.EulerDiscreteScheduler(final_sigmas_type="sigma_min"),
            "with final_sigmas_type='sigma_min' cannot be exported. Export with scheduler=",
        ),
        (diffusers.PNDMScheduler(), "with skip_prk_steps=False"),
    ],
)
def test_schedulers_that_are_not_there(scheduler, match):
    with pytest.raises(ExportError, match=match):
        read_schedule(scheduler)
    schedule, alphas = read_schedule(scheduler, "ddim")
    assert schedule.kind == "ddim" and (alphas == scheduler.alphas_cumprod.numpy()).all()


def test_folders_are_replaced_only_when_asked(tmp_path, exported):
    pipe = tiny_sd(unet=SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is no exported model, so it is not replaced"):
        perfusion.export(pipe, tmp_path / "mine", overwrite=True)
    shutil.copytree(exported("sd"), tmp_path / "old")
    with pytest.raises(FileExistsError, match="is there already. Choose another folder, or say --overwrite"):
        perfusion.export(pipe, tmp_path / "old")
    pipe.save_pretrained(tmp_path / "model")
    written = run("export", tmp_path / "model", tmp_path / "old", "--format", "pt2", "--dtype", "float16", "--scheduler", "euler", "--overwrite")
    assert written.exit_code == 0, written.output
    manifest = Manifest.read(tmp_path / "old")
    assert (manifest.format, manifest.dtype, manifest.schedule.kind) == ("pt2", "float16", "euler")
    assert not (tmp_path / "old" / "unet.onnx").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model", "old"]


# folders that are not to be trusted


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported("sd"), tmp_path / "copy"))


def edit(path, change):
    facts = json.loads((path / MANIFEST).read_text())
    change(facts)
    (path / MANIFEST).write_text(json.dumps(facts))


def put(*keys):
    *way, value = keys

    def change(facts):
        for key in way[:-1]:
            facts = facts[key]
        facts[way[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("perfusion_export", 2), "its format version is 2, this Perfusion reads 1"),
        (put("token_length", 10**9), "token_length must be a whole number from 3 to 4096, got 1000000000"),
        (put("token_length", True), "token_length must be a whole number"),
        (put("height", 18), "height must be a multiple of 4 pixels"),
        (put("base", "layers", {"a": -1}), "layers must be an object of at most 1024 layer names and widths"),
        (put("base", "text_encoder", "x"), "not a text encoder fingerprint"),
        (put("base", "family", "sdxl"), "family must be 'custom'"),
        (put("tokenizers", []), "tokenizers must be 1 objects"),
        (put("schedule", "kind", "unipc"), "kind must be one of ddim, pndm, euler, got 'unipc'"),
        (put("schedule", "final_alpha", 2), "final_alpha must be a number from 0 to 1"),
        (put("files", "../../etc/passwd", "0"), "does not fit"),
        (put("files", {}), "files must name"),
        (put("max_rows", 0), "max_rows must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_manifests_are_checked(change, match, copy):
    edit(copy, change)
    with pytest.raises(ExportedFolderError, match=match):
        Runtime(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', "[" * 10**5, "x" * (2**20 + 1)])
def test_what_is_no_manifest(text, copy):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ExportedFolderError, match="damaged or was not written by"):
        Runtime(copy)


def test_a_model_folder_is_no_export(tmp_path):
    with pytest.raises(ExportedFolderError, match="has no manifest.json: it is not an exported model. `perfusion export MODEL"):
        Runtime(tmp_path)


def test_files_of_another_export_are_found(copy, exported):
    """By their digests, and where the manifest was changed with them, by their shapes."""
    other = exported("sdxl")
    for name in ("unet.onnx", "text_encoder.onnx", "weights.safetensors"):
        mine = (copy / name).read_bytes()
        shutil.copy(other / name, copy / name)
        with pytest.raises(ExportedFolderError, match=f"{name} is not the file that this export wrote"):
            Runtime(copy)
        edit(copy, put("files", name, digest(copy / name)))
        if name != "text_encoder.onnx":  # whose inputs are the same: its outputs are not
            with pytest.raises(ExportedFolderError, match=f"{name} must (take|hold) .* belongs to another model"):
                Runtime(copy)
        (copy / name).write_bytes(mine)
        edit(copy, put("files", name, digest(copy / name)))
    (copy / "unet.onnx").unlink()
    with pytest.raises(ExportedFolderError, match="unet.onnx is missing"):
        Runtime(copy)


@pytest.mark.parametrize("name", ["unet.onnx", "tokenizer.json", "weights.safetensors"])
def test_garbage_is_refused(name, copy):
    (copy / name).write_bytes(b"\x80\x02garbage")
    with pytest.raises(ExportedFolderError, match=f"{name}.*(cannot load|is no)"):
        edit(copy, put("files", name, digest(copy / name)))
        Runtime(copy)


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_missing_packages_are_named(package, copy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    how = r"Install it: pip install 'perfusion-kernels\[export\]'"
    if package == "onnxruntime":
        with pytest.raises(ExportedFolderError, match=f"needs onnxruntime .*{how}"):
            Runtime(copy)
    with pytest.raises(ExportError, match=f"ONNX needs the package {package}. {how}"):
        perfusion.export(tiny_sd(unet=SMALL), tmp_path / "out")


def test_concepts_of_another_base_are_refused(sd, concepts):
    with pytest.raises(ValueError, match="cannot be used with this export: made for a custom model .text width 16 . 24"):
        sd.load(Concept.of(concepts["sdxl"][0]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(prompt="a <dog>"), "no concept <dog> is loaded"),
        (dict(prompt="a <teddy> <teddy:0.5>"), "is named twice with different settings"),
        (dict(prompt="cat " * 80 + "<teddy>"), "lies beyond the 77 tokens"),
        (dict(prompt="a <teddy>", bias=[0.5, 9]), "bias must be a number between -2 and 2"),
        (dict(prompt="a <teddy>", bias={"teddy": []}), "a schedule of bias must have at least one number"),
        (dict(prompt="a <teddy>", bias={"tedy": 0.5}), r"sets bias for <tedy>, which is no concept here; there are: .*<teddy>"),
        (dict(prompt="a <teddy>", strength=lambda step: float("inf")), "<teddy> at step 0: strength must be a number between 0 and 4"),
        (dict(prompt="a <teddy>", key_lock="both"), "key_lock must be 'local' or 'global', got 'both'"),
        (dict(prompt="a <teddy>", guidance_scale=float("nan")), "guidance_scale must be a number from 0 to 100"),
        (dict(prompt="a <teddy>", latents=np.zeros((4, 8, 9))), r"latents must be finite numbers of shape \(4, 8, 8\)"),
    ],
)
def test_requests_are_checked(change, match, sd):
    with pytest.raises(ValueError, match=match):
        sd.sample([Request(**change)], steps=1)


def test_guidance_and_steps_are_those_that_suit_the_model(sd, monkeypatch):
    monkeypatch.setitem(FAMILIES, sd.manifest.base.family, dataclasses.replace(CUSTOM, steps=3, guidance_scale=2.5))
    usual = sd.sample([Request("a cat", seed=3)])
    assert np.array_equal(usual, sd.sample([Request("a cat", seed=3, guidance_scale=2.5)], steps=3))
    assert not np.allclose(usual, sd.sample([Request("a cat", seed=3, guidance_scale=6.0)], steps=3), atol=1e-3)


def test_settings_that_there_are_not(sd):
    for setting, match in {"regions": "regions need attention that reads masks", "colour": "there is no setting 'colour'"}.items():
        with pytest.raises(ValueError, match=match):
            sd.set("teddy", **{setting: 1})


def test_copies_of_a_concept_do_not_share_a_prompt(exported, concepts):
    runtime = Runtime(exported("sd"), threads=1)
    for name in ("one", "two"):
        runtime.load(Concept.of(concepts["sd"][0]), name)
    with pytest.raises(PromptError, match="<one>, <two> are nearly the same concept"):
        runtime.prepare([Request(prompt="<one> and <two>")])


# without torch

FRESH = """
import sys

class Absent:
    \"\"\"As on a machine that has none of them.\"\"\"

    names = {"torch", "diffusers", "transformers", "accelerate", "triton", "onnx", "onnxscript", "perfusion_kernels"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"no {name} here")

sys.meta_path.insert(0, Absent())
import numpy as np
from typer.testing import CliRunner
from perfusion import cli
from perfusion.runtime import Request, Runtime

exported, anna, ben, output = sys.argv[1:]
runtime = Runtime(exported, threads=1)
runtime.load(anna, "anna-teddy")
runtime.load(ben, "ben-teddy")
requests = [
    Request(prompt="a <teddy:0.8> on a beach", names={"teddy": f"{user}-teddy"}, seed=seed, guidance_scale=5)
    for seed, user in enumerate(("anna", "ben"))
]
images = runtime.decode(runtime.sample(requests, steps=3)).transpose(0, 2, 3, 1)
np.save(output + ".npy", images)

def run(*arguments):
    return CliRunner().invoke(cli.app, [*arguments, "--runtime", "onnx", "--model", exported, "--steps", "3", "--guidance-scale", "5", "--output", output + ".png"])

drawn = run("generate", "a <teddy:0.8> on a beach", "--concept", f"teddy={anna}")
assert drawn.exit_code == 0, drawn.output
broken = run("generate", "a <teddy>", "--concept", __file__, "--overwrite")
assert broken.exit_code == 3 and "a safetensors header begins with" in broken.output, broken.output
assert not Absent.names & set(sys.modules), Absent.names & set(sys.modules)
"""


@pytest.mark.numeric
def test_a_process_without_torch_draws_the_same(tmp_path, exported, pipelines, concepts):
    """Two users with their own <teddy> in one batch, in numpy and onnxruntime alone, and the command; against the pipeline in torch."""
    files = []
    for concept in concepts["sd"][:2]:
        files.append(tmp_path / f"{concept.name}.safetensors")
        concept.save(files[-1])  # in half precision, as concepts travel
    (tmp_path / "fresh.py").write_text(FRESH)
    command = [sys.executable, tmp_path / "fresh.py", exported("sd"), *files, tmp_path / "fresh"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    mine = np.load(tmp_path / "fresh.npy")
    pipe = pipelines["sd"]
    with perfusion.attach(pipe) as handle:
        for user, file in zip(("anna", "ben"), files):
            handle.load(file, f"{user}-teddy")
        prompts = [f"a <{user}-teddy:0.8> on a beach" for user in ("anna", "ben")]
        theirs = as_run(lambda: draw(pipe, prompts, ["", ""], guidance_scale=5.0))
    assert_same_run(mine, theirs)
    assert np.abs(mine[0] - mine[1]).max() > 0.02
    picture = np.asarray(Image.open(tmp_path / "fresh.png")).astype(int)
    assert np.abs(picture - 255 * theirs.value[0].numpy()).max() < 1


# the command line


def test_the_commands(tmp_path, exported, concepts):
    """Both runtimes draw equal pictures."""
    concepts["sd"][0].save(tmp_path / "teddy.safetensors", torch.float32)
    onnx = exported("sd")
    model = onnx.parent / "model"
    for runtime, source in (("torch", model), ("onnx", onnx)):
        arguments = ("--model", source, "--concept", tmp_path / "teddy.safetensors", "--steps", STEPS, "--count", 2)
        drawn = run("generate", "a <teddy:0.9>", *arguments, "--runtime", runtime, "--output", tmp_path / f"{runtime}.png")
        assert drawn.exit_code == 0, drawn.output
    for number in (1, 2):
        mine, theirs = (np.asarray(Image.open(tmp_path / f"{runtime}-{number}.png")).astype(int) for runtime in ("onnx", "torch"))
        assert np.abs(mine - theirs).max() <= 1
    assert run("export", model, onnx).exit_code == 2
    wrong = run("generate", "a cat", "--runtime", "onnx", "--model", model, "--output", tmp_path / "x.png")
    assert wrong.exit_code == 3 and "it is not an exported model" in wrong.output
    wrong = run("generate", "a cat", "--runtime", "onnx", "--model", onnx, "--device", "cpu", "--output", tmp_path / "x.png")
    assert wrong.exit_code == 2 and "--device is for --runtime torch" in wrong.output
