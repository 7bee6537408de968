"""diffusers' own tests of the pipelines that concepts work with, once plain and twice with perfusion attached: none may be lost.

    python -m tests.peers FOLDER [--offline] [test_file.py ...] [options of pytest]

FOLDER is a checkout of diffusers, best of the installed version. Its tests load small tokenizers from the model hub, so they need the
network or a filled cache; with --offline they get stand-ins instead, and those that compare with numbers are then not counted. The runs are: plain; every pipeline attached at its first call; and so with a concept loaded that no prompt names.
A test that passes plain and does not pass in the others is printed, and makes the exit status 1. What never passes plain is not counted.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

MODES = ("attached", "loaded")
VARIABLE = "PERFUSION_PEERS"  # the mode of a run, for the plugin below
FOLDERS = (
    "stable_diffusion", "stable_diffusion_2", "stable_diffusion_adapter", "stable_diffusion_xl", "controlnet", "pag", "animatediff",
    "latent_consistency_models", "kolors", "pixart_alpha", "pixart_sigma",
)  # fmt: skip


def test_files(folder: Path) -> list[Path]:
    """The files of a diffusers checkout that test the pipelines of docs/pipelines.md."""
    found = [path for name in FOLDERS for path in sorted((folder / "tests/pipelines" / name).glob("test_*.py"))]
    found = [path for path in found if not any(word in path.name for word in ("flax", "onnx", "sd3", "flux", "hunyuan", "_video"))]
    if not found:
        raise SystemExit(f"{folder} has no tests/pipelines/stable_diffusion/test_*.py: give a checkout of diffusers.")
    return found


def passed(folder: Path, files: list[Path], options: list[str], mode: str | None, hub: dict[str, str]) -> set[str]:
    """The tests that pass in one run of pytest of its own. hub: environment variables of the model hub."""
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        paths = [str(folder), str(here), str(here / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **hub, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), f"--junitxml={report}"]
        if mode is not None:
            environment[VARIABLE] = mode
            command += ["-p", "perfusion_peers"]
        # diffusers' tests are a package called `tests` too, so this file goes by another name there
        Path(scratch, "perfusion_peers.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        environment["PYTHONPATH"] = scratch + os.pathsep + environment["PYTHONPATH"]
        subprocess.run([*command, *options, *map(str, files)], cwd=folder, env=environment)
        if not report.exists():
            raise SystemExit("pytest wrote no report; what it printed says why.")
        cases = ElementTree.parse(report).iter("testcase")
        bad = ("failure", "error", "skipped")
        return {f"{case.get('classname')}::{case.get('name')}" for case in cases if not any(case.find(kind) is not None for kind in bad)}


def main(arguments: list[str]) -> int:
    if not arguments:
        raise SystemExit(__doc__)
    folder, rest = Path(arguments[0]).resolve(), arguments[1:]
    chosen = [each for each in rest if each.endswith(".py")]
    options = [each for each in rest if each not in chosen and each != "--offline"]
    files = [path for path in test_files(folder) if not chosen or any(str(path).endswith(each) for each in chosen)]
    from tests import peers_hub  # here, for among diffusers' tests this file is a plugin, and `tests` is theirs

    with tempfile.TemporaryDirectory() as cache:
        hub = peers_hub.write(Path(cache)) if "--offline" in rest else {}
        plain = passed(folder, files, options, None, hub)
        if not plain:
            raise SystemExit("no test passes without perfusion, so there is nothing to compare; can the tests' tokenizers be loaded?")
        lost = {mode: sorted(plain - passed(folder, files, options, mode, hub)) for mode in MODES}
    for mode, names in lost.items():
        print(f"{mode}: {len(plain) - len(names)} of {len(plain)} tests that pass plain")
        for name in names:
            print(f"  lost: {name}")
    return int(any(lost.values()))


# the plugin


def pytest_configure(config: Any) -> None:
    """Attach perfusion to every supported pipeline at its first call."""
    mode = os.environ.get(VARIABLE)
    if mode not in MODES:
        return
    import diffusers

    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline) and "__call__" in vars(kind):
            kind.__call__ = _attaching(kind.__call__, mode)


def _attaching(call: Any, mode: str) -> Any:
    from perfusion.base import UnsupportedPipeline
    from perfusion.handle import attach

    @functools.wraps(call)
    def attached(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(pipe, "_perfusion_handle", None) is None:
            try:
                handle = attach(pipe)
            except UnsupportedPipeline:
                return call(pipe, *args, **kwargs)
            if mode == "loaded":
                handle.load(_concept(pipe))
        return call(pipe, *args, **kwargs)

    return attached


def _concept(pipe: Any) -> Any:
    """A random concept of the pipeline's shape, called by a word that its tokenizers have."""
    import torch

    from perfusion.base import describe_base, text_encoders
    from perfusion.concept import Concept

    base = describe_base(pipe, text_required=False)
    if not base.text_encoder:  # of a pipeline that is given encodings: its concepts were made where there were encoders
        base = dataclasses.replace(base, text_encoder=base64.b64encode(bytes([1] * 32)).decode("ascii"))
    numbers = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    target = numbers(base.encoding_dim)
    return Concept(
        name="perfusion-peer",
        superclass=_word([tokenizer for tokenizer, _ in text_encoders(pipe, required=False)]),
        base=base,
        value_outputs=numbers(base.outputs),
        target=target,
        metric_target=target,  # as if the encodings had unit covariance
        superclass_encoding=numbers(base.encoding_dim),
        word_embeddings=tuple(numbers(width) for width in base.text_widths),
        key_outputs=None,
    )


def _word(tokenizers: list[Any]) -> str:
    """A word that is one token of all tokenizers."""
    words = sorted(tokenizers[0].get_vocab()) if tokenizers else ["thing"]
    whole = [each for each in words if each.endswith("</w>") or each.startswith("▁") or not tokenizers]
    for word in (each.removesuffix("</w>").removeprefix("▁") for each in whole):
        if word.isalpha() and all(len(each(word, add_special_tokens=False).input_ids) == 1 for each in tokenizers):
            return word
    return "thing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
