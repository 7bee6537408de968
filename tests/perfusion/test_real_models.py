"""docs/real-models.md, command by command, with a checkpoint file of the real layout, key names and vocabulary, and random weights."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import perfusion
from perfusion import cli, hub
from perfusion.captions import everyday_captions
from perfusion.checkpoint_file import Kind
from perfusion.cli.generate import _source
from perfusion.cli.models import _file_and_scale
from perfusion.concept import Concept
from perfusion.covariance import Covariance, compute_covariance
from perfusion.models import ModelError, _beside, add_embedding, add_lora, load_pipeline
from tests.perfusion.learning import write_pictures
from tests.perfusion.original_layout import original_layout, pipeline_of, use_small_families

pytestmark = pytest.mark.pipelines

PAGE = Path(__file__).parents[2] / "docs" / "real-models.md"
SHORT = {"train": ["--steps", "2", "--batch-size", "2", "--covariance", "c.safetensors", "--device", "cpu", "--no-tensorboard", "--validation-every", "0",
                   "--resolution", "64"], "generate": ["--steps", "1", "--device", "cpu", "--overwrite"]}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder: the checkpoint file and the pictures that the page speaks of, and a covariance of few captions."""
    use_small_families(monkeypatch)
    monkeypatch.chdir(tmp_path)
    pipe = pipeline_of(Kind("sd1", 4, "epsilon", True))
    save_file(original_layout(pipe, "sd1"), "dreamshaper_8.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compute_covariance(pipe, list(everyday_captions(64)), progress=False, max_condition=1e4).save(tmp_path / "c.safetensors")
    write_pictures(tmp_path / "mug")
    (tmp_path / "mug" / "1.txt").write_text("a <mug> on a wooden table, by the window")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_page_works(here, monkeypatch):
    own, short = perfusion.train, dict(steps=2, batch_size=2, resolution=64, validation_every=0, tensorboard=False, progress=False)
    covariance = Covariance.load("c.safetensors")
    monkeypatch.setattr(perfusion, "train", lambda *given, **options: own(*given, covariance=covariance, **options, **short))
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["handle"].concepts()["mug"].superclass == names["concept"].superclass == "coffee mug"
    with Image.open("mug.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_works(here, monkeypatch):
    tmp_path, pushed = here, []
    monkeypatch.setattr(hub, "push", lambda source, repository, **_: pushed.append((str(source), repository)) or "https://hub/you/mug")
    monkeypatch.setattr(hub, "concept_file", lambda text, revision=None: tmp_path / "concepts" / "mug" / "mug.safetensors")
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1].replace("\\\n", " ")
    commands = [
        words for line in block.splitlines() for part in line.split("&&") if (words := shlex.split(part, comments=True))[:1] == ["perfusion"]
    ]
    assert [words[1] for words in commands] == ["info", "train", "generate", "generate", "convert", "push", "generate"]
    for words in commands:
        result = CliRunner().invoke(cli.app, [*words[1:], *SHORT.get(words[1], [])], prog_name="perfusion")
        assert result.exit_code == 0, (words, result.output)
    assert Concept.load("concepts/mug/mug.safetensors").superclass == "coffee mug" and pushed == [("concepts/mug", "you/mug")]
    assert len(list(tmp_path.glob("mug-1*.png"))) >= 1 and (tmp_path / "mug.png").exists()
    # what was converted opens where the program is not
    other = load_pipeline("dreamshaper_8.safetensors", device="cpu")
    (lora,), (embedding,) = (list(tmp_path.glob(f"mug-a1111/{place}/mug.safetensors")) for place in ("models/Lora", "embeddings"))
    assert add_lora(other, str(lora)) == "mug" and add_embedding(other, str(embedding), token="<mug>") == "<mug>"


@pytest.mark.smoke
def test_folders_of_every_kind(tmp_path):
    """fp16 variants alone, pickles, and sharded files."""
    import torch

    from tests.perfusion.tiny import tiny_sd

    pipe = tiny_sd()
    for name, options in {"fp16": dict(variant="fp16"), "bin": dict(safe_serialization=False), "shards": dict(max_shard_size="20KB")}.items():
        pipe.save_pretrained(tmp_path / name, **options)
        if name == "bin":  # transformers writes no pickles any more
            (tmp_path / name / "text_encoder" / "model.safetensors").unlink(missing_ok=True)
            torch.save(pipe.text_encoder.state_dict(), tmp_path / name / "text_encoder" / "pytorch_model.bin")
        files = {path.name for path in (tmp_path / name / "unet").iterdir()}
        assert any({"fp16": ".fp16.", "bin": ".bin", "shards": "-of-"}[name] in file for file in files), files
        loaded = load_pipeline(tmp_path / name, device="cpu")
        for part in ("unet", "text_encoder", "vae"):
            for key, value in getattr(pipe, part).state_dict().items():
                assert torch.equal(getattr(loaded, part).state_dict()[key], value), (name, part, key)


NAMES = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES.filter(lambda name: name.strip(".") and not name.startswith("~")), strength=st.sampled_from(["", ":0.5", ":-1"]), ended=st.booleans())
@example(name="style v1.2", strength="", ended=False)
@example(name="a:b", strength=":0.5", ended=True)
@example(name="a:1", strength="", ended=True)
def test_a_bare_name_means_the_file_beside_the_model(tmp_path, name, strength, ended):
    """Whatever the file is called, with its ending or without, in each of the folders; the file that is found is the one that was meant."""
    folder = tmp_path / "bare"
    for place in ("", "loras", "Lora"):
        (folder / "model" / place).mkdir(parents=True, exist_ok=True)
        file = folder / "model" / place / f"{name}.safetensors"
        file.write_bytes(b"x")
        try:
            given, scale = _file_and_scale((file.name if ended else name) + strength)
            if not strength and not ended and ":" in name:  # a name that ends in a number reads as a strength: it is given with its ending
                return
            assert scale == float(strength[1:] or 1) and _beside(folder / "model", given, ("loras", "Lora")) == file
        finally:
            file.unlink()
    with pytest.raises(ModelError, match="there is no file"):
        _beside(folder / "model", given, ("loras", "Lora"))


@pytest.mark.parametrize("text", ["x" * 5000, "~nobody-of-that-name/x", "a\0b", "user/" + "x" * 300, ""])
def test_text_that_no_file_can_be_called_is_refused_in_words(text):
    """A prompt, a token or a list that was given in the place of a path."""
    impossible = "is too long|holds a zero byte|begins with the home of a user"
    with pytest.raises(ModelError, match=f"there is no file|{impossible}"):
        _beside("toybox", text, ("loras",))
    if not text.startswith("user/"):
        with pytest.raises(ModelError, match=f"neither a folder nor a file|has no model_index.json|{impossible}"):
            load_pipeline(text or "nothing here", device="cpu")
        with pytest.raises((OSError, ValueError)):
            Concept.load(text)
    if text:
        with pytest.raises(ValueError, match=impossible):
            _source(text)
    assert _file_and_scale(text) == (text, 1.0)


def test_strengths_of_loras():
    assert _file_and_scale("C:/x.safetensors") == ("C:/x.safetensors", 1.0) and _file_and_scale("x:-0.5") == ("x", -0.5)
    for text in ("x:nan", "x:inf"):
        with pytest.raises(ValueError, match="must be a finite number"):
            _file_and_scale(text)
