"""What a wheel would hold and say, read by setuptools itself from pyproject.toml; nothing is built."""

import importlib.util
import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import perfusion
from perfusion import cli
from perfusion.cli import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distribution():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = setuptools.Distribution({"script_name": "setup.py"})
        distribution.parse_config_files()
        yield distribution


@pytest.fixture(scope="module")
def files(distribution):
    """Every file of the wheel, as source paths from the root."""
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    sources = [Path(source) for _, _, source in build.find_all_modules()]
    sources += [Path(folder, name) for _, folder, _, names in build.data_files for name in names]
    return {str(source.relative_to(ROOT) if source.is_absolute() else source) for source in sources}


def tree(folder, pattern="*.py"):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.is_file()}


def test_both_packages_go_in_with_every_module_and_nothing_else_does(files):
    assert {file for file in files if file.endswith(".py")} == tree("perfusion_kernels") | tree("python/perfusion")


def test_data_goes_in(files):
    data = set().union(*(tree(f"python/perfusion/{folder}", "*") for folder in ("configurations", "templates", "toybox/weights")))
    assert {file for file in files if not file.endswith(".py")} == data


def test_the_built_in_model_is_there_and_small(files):
    weights = [file for file in files if file.startswith("python/perfusion/toybox/weights/")]
    assert "python/perfusion/toybox/weights/model_index.json" in weights
    assert sum((ROOT / file).stat().st_size for file in weights) <= 16 * 2**20


def test_badges_say_what_the_package_asks_for(distribution):
    badges = re.findall(r"img\.shields\.io/badge/([^)]+?)-[0-9a-f]+\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    lowest = {each.name: next(iter(each.specifier)).version for each in map(Requirement, distribution.install_requires)}
    lowest["Python"] = next(iter(SpecifierSet(str(distribution.python_requires)))).version
    shown = dict(badge.replace("--", "\0").split("-", 1) for badge in badges)
    for name in ("Python", "torch", "diffusers"):
        assert shown.pop(name) == f"{lowest[name]}%2B"
    assert shown.pop("license").replace("\0", "-") == distribution.metadata.license_expression
    assert shown == {"paper": "arXiv_2305.01644"}


def test_one_version(distribution):
    assert distribution.get_version() == perfusion.__version__
    assert re.search(rf"^## {re.escape(perfusion.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_command_is_the_one_that_is_tested(distribution):
    command = distribution.entry_points["console_scripts"]
    assert command == ["perfusion = perfusion.cli:main"]
    assert EntryPoint("perfusion", "perfusion.cli:main", "console_scripts").load() is cli.main


def test_metadata(distribution):
    metadata = distribution.metadata
    assert (metadata.get_name(), metadata.license_expression) == ("perfusion-kernels", "Apache-2.0")
    assert str(distribution.python_requires) == ">=3.10"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_requirements_have_lower_bounds_and_the_doctor_knows_them(distribution):
    required = [Requirement(line) for line in distribution.install_requires]
    assert {requirement.name for requirement in required} == set(doctor.REQUIRED)
    extras = [Requirement(line) for lines in distribution.extras_require.values() for line in lines]
    for requirement in (*required, *extras):
        assert requirement.name == "perfusion-kernels" or str(requirement.specifier).startswith(">="), requirement


def test_constraints_pin_what_is_required_and_fit(distribution):
    """Every direct requirement is pinned, for each supported Python, to a version that its lower bound allows."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    wanted = [*distribution.install_requires, *(line for name in ("train", "export", "test", "dev") for line in distribution.extras_require[name])]
    for requirement in map(Requirement, wanted):
        for python in ("3.10", "3.11", "3.13"):
            found = [p for p in pins if p.name == requirement.name and (p.marker is None or p.marker.evaluate({"python_version": python}))]
            if requirement.name != "perfusion-kernels":
                assert len(found) == 1 and requirement.specifier.contains(str(found[0].specifier)[2:]), (requirement, python)


def test_public_names():
    for name in perfusion.__all__:
        value = getattr(perfusion, name)
        assert isinstance(value, str) or value.__doc__, name
    assert set(perfusion.__all__) <= set(dir(perfusion))
    assert callable(perfusion.train), "the function, not a module of that name"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has Concept, "):
        perfusion.nonsense


# the step of the build that compiles the CUDA kernels; tests/compiled/test_torch_library.py lets it do so


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, on a machine with nvcc and torch."""
    spec = importlib.util.spec_from_file_location("perfusion_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("PERFUSION_CUDA", raising=False)
    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(module, "find_torch", lambda: ROOT)
    return module


def test_kernels_are_compiled_where_they_can_be(script, monkeypatch):
    assert script.why_not() is None
    monkeypatch.setattr(script, "find_torch", lambda: None)
    assert "torch 2.10 or newer, whose headers are needed, was not there" in script.why_not()
    monkeypatch.setattr(script, "find_nvcc", lambda: None)
    assert script.why_not() == "there was no nvcc when this was installed"
    monkeypatch.setenv("PERFUSION_CUDA", "1")
    with pytest.raises(SystemExit, match="PERFUSION_CUDA is 1, but the CUDA kernels cannot be compiled: there was no nvcc"):
        script.why_not()
    monkeypatch.setenv("PERFUSION_CUDA", "0")
    assert script.why_not() == "PERFUSION_CUDA was 0 when this was installed"
    monkeypatch.setenv("PERFUSION_CUDA", "yes")
    with pytest.raises(SystemExit, match="PERFUSION_CUDA must be 0 or 1, or not set; got 'yes'"):
        script.why_not()


def test_nvcc_is_looked_for_where_toolkits_put_it(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("perfusion_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for folder in ("toolkit/bin", "own"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert module.find_nvcc() == str(tmp_path / "toolkit/bin/nvcc")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "own/nvcc"))
    assert module.find_nvcc() == str(tmp_path / "own/nvcc")
    assert module.find_torch() == Path(torch.__file__).parent
    assert module.missing_tools() == ["cmake>=3.24", "ninja"]  # none on this PATH


def run_step(script, folder):
    distribution = script.PerfusionKernels({"name": "perfusion-kernels", "version": "0"})
    step = script.BuildCuda(distribution)
    step.build_lib = str(folder)
    step.run()
    return distribution, folder / "perfusion_kernels" / "cuda"


def test_without_nvcc_it_installs_and_says_so(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "find_nvcc", lambda: None)
    left = tmp_path / "perfusion_kernels" / "cuda" / script.LIBRARY
    left.parent.mkdir(parents=True)
    left.write_text("of an earlier build")
    distribution, package = run_step(script, tmp_path)
    assert capsys.readouterr().out == "perfusion-kernels: without CUDA kernels; there was no nvcc when this was installed\n"
    assert json.loads((package / "build.json").read_text()) == {"reason": "there was no nvcc when this was installed"}
    assert not left.exists()
    assert tag(script, distribution) == ("py3", "none", "any")


def test_with_nvcc_the_library_goes_in(script, monkeypatch, tmp_path, capsys):
    (tmp_path / "compiled.so").write_text("library")
    content = {"architectures": ["sm_80"], "cuda": "13.0", "torch": "2.13"}
    monkeypatch.setattr(script, "compile_library", lambda: (tmp_path / "compiled.so", content))
    distribution, package = run_step(script, tmp_path)
    assert capsys.readouterr().out == "perfusion-kernels: CUDA kernels for sm_80\n"
    assert (package / script.LIBRARY).read_text() == "library" and json.loads((package / "build.json").read_text()) == content
    python, abi, platform = tag(script, distribution)
    assert (python, abi) == ("py3", "none") and platform != "any"


def tag(script, distribution):
    wheel = script.Wheel(distribution)
    wheel.ensure_finalized()
    return wheel.get_tag()
