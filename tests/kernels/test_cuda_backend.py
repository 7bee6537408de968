"""The compiled backend without a compiler or a GPU: when it is there, what it refuses, what it says. Tensors on a GPU are fake.

What its kernels compute, and that torch's tensors reach them, tests/cuda_host says.
"""

import importlib
import json
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import perfusion_kernels
from perfusion_kernels import backend, registration
from perfusion_kernels import cuda as compiled
from perfusion_kernels.cuda import library, supports

from . import cases

BUILD = {"cuda": "13.0", "torch": "2.13", "architectures": ["sm_80", "sm_90a"]}
CACHED = (library.note, library.loaded, library.why_not_loaded, library.why_not_on, library.shared_memory, library.ask)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A package folder of its own: `installed(content)` writes its build.json and pretends that torch has CUDA."""

    def forget():
        for function in CACHED:
            function.cache_clear()

    def install(content, cuda="13.0"):
        forget()
        monkeypatch.setattr(library, "FOLDER", tmp_path)
        monkeypatch.setattr(library, "LIBRARY", tmp_path / library.LIBRARY.name)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        if content is not None:
            (tmp_path / "build.json").write_text(content if isinstance(content, str) else json.dumps(content))

    yield install
    monkeypatch.undo()
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """One GPU, on which the library runs, and Triton; tensors on it are fake."""
    shared_memory = pytest.importorskip("perfusion_kernels.triton.shared_memory")
    monkeypatch.setattr(shared_memory, "_of_cuda", lambda device: 101376)
    monkeypatch.setattr(library, "why_not_on", lambda device: None)
    monkeypatch.setattr(library, "shared_memory", lambda device: 101376)
    monkeypatch.setattr(library, "ask", answer)
    mode = FakeTensorMode()

    def move(tensors):
        with mode:
            return {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in tensors.items()}

    return move


def answer(question, *numbers):
    """As a library would whose kernels have heads of 32 and 40 columns, and whose memory holds 200 tokens of one edited side."""
    if question == "concept_gates_most":
        return 1000
    shared_memory, d, sides, *_ = numbers
    return 0 if d not in (32, 40) else 256 if shared_memory > 101376 else 201 - sides


@pytest.fixture
def registered(monkeypatch):
    """The compiled operators in the list of backends, with overloads that live as long as the process."""
    operators = [importlib.import_module(f"perfusion_kernels.{name}").OPERATOR for name in compiled.OPERATORS]
    before = [dict(operator.backwards) for operator in operators]
    implementations = {name: dict(have) for name, have in backend._implementations.items()}
    for have in (*implementations.values(), *(operator.backwards for operator in operators)):
        have.pop("cuda", None)
    monkeypatch.setattr(backend, "_implementations", implementations)
    for function in ("bind", "bind_backward"):
        monkeypatch.setattr(backend, function, once(getattr(registration, function), function.replace("bind", "")))
    compiled.register_all()
    yield
    for operator, backwards in zip(operators, before):
        operator.backwards.clear()
        operator.backwards.update(backwards)


def once(bind, suffix):
    """`bind`, but for an overload that there is already."""

    def bound(operator, name, implementation):
        operation = f"{operator.name}{suffix}"
        if hasattr(getattr(torch.ops.perfusion_kernels, operation, None), name):  # a library that was loaded brings kernels without it
            return cases.overload_of(operation, name)
        return bind(operator, name, implementation)

    return bound


# whether it is there


@pytest.mark.parametrize(
    ("content", "cuda", "reason"),
    [
        (None, "13.0", "not compiled: this source tree has not been installed (pip install -e .)"),
        ({"reason": "there was no nvcc when this was installed"}, "13.0", "not compiled: there was no nvcc when this was installed"),
        (BUILD, None, f"this PyTorch ({torch.__version__}) is built without CUDA"),
        (BUILD, "13.0", None),
    ],
)
def test_what_can_be_known_without_loading(installed, monkeypatch, content, cuda, reason):
    installed(content, cuda)
    monkeypatch.setattr(library, "loaded", lambda: pytest.fail("it was loaded"))
    assert library.absent() == reason
    if reason:
        assert library.unavailable() == reason


def test_a_broken_note_is_a_reason(installed):
    installed("{")
    assert "build.json cannot be read (" in library.absent() and library.absent().endswith("; install again")


def test_a_library_that_does_not_load_is_a_reason(installed):
    installed(BUILD)
    library.LIBRARY.write_bytes(b"not a library")
    assert library.unavailable().startswith("libperfusion_kernels_torch.so does not load: ")
    assert "file too short" in library.unavailable() or "invalid ELF header" in library.unavailable()
    assert library.compiled_kernels() == {**BUILD, "reason": library.unavailable()}


def test_a_library_without_a_registry_is_of_another_version(installed, monkeypatch):
    installed(BUILD)
    monkeypatch.setattr(library, "loaded", lambda: types.SimpleNamespace())
    reason = "libperfusion_kernels_torch.so was compiled for another version: it does not list its kernels; install again"
    assert library.compiled_kernels() == {**BUILD, "reason": reason}


def test_where_nothing_was_compiled_there_is_nothing_to_list(installed, monkeypatch):
    installed({"reason": "there was no nvcc when this was installed"})
    monkeypatch.setattr(library, "loaded", lambda: pytest.fail("it was loaded"))
    assert library.compiled_kernels() == {"reason": "there was no nvcc when this was installed"}


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ((), "no CUDA device is visible"),
        (((7, 5),), "cuda:0 has compute capability 7.5, and the kernels were compiled for sm_80, sm_90a"),
        (((7, 5), (8, 6)), None),
    ],
)
def test_the_devices_decide(installed, monkeypatch, devices, reason):
    installed(BUILD)
    monkeypatch.setattr(library, "why_not_loaded", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device])
    assert library.unavailable() == reason


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["sm_90a"], [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        (["sm_100f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (["compute_80"], [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        (["sm_80", "compute_80", "sm_90a"], [(8, 0), (9, 0), (12, 0)], [(7, 0)]),
        (["sm_120", "compute_120"], [(12, 0), (12, 1), (13, 0)], [(10, 0)]),
    ],
)
def test_what_code_runs_where(architectures, runs, does_not):
    assert all(library.runs_on(architectures, *each) for each in runs)
    assert not any(library.runs_on(architectures, *each) for each in does_not)


@pytest.mark.parametrize(("driver", "refused"), [(0, False), (12, True), (13, False), (14, False)])
def test_an_old_driver_is_a_reason(driver, refused):
    def versions(runtime, found):
        runtime._obj.value, found._obj.value = 13, driver

    reason = library.too_new(types.SimpleNamespace(perfusion_torch_cuda_versions=versions))
    assert bool(reason) is refused and (not refused or "compiled with CUDA 13, and the driver here supports CUDA 12" in reason)


def test_types_of_a_schema():
    schema = "(Tensor a, Tensor? b, bool[] needs, float scale) -> (Tensor c, Tensor d)"
    assert library.types(schema) == "(Tensor, Tensor?, bool[], float) -> (Tensor, Tensor)"
    assert library.types("(Tensor a) -> Tensor[]") == "(Tensor) -> Tensor[]"


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(backend._unavailable, "cuda", lambda: "no CUDA device is visible")
    monkeypatch.delitem(backend._absent, "cuda", raising=False)
    status = perfusion_kernels.available_backends()[0]
    assert (status.available, str(status)) == (False, "cuda: unavailable, no CUDA device is visible")
    arguments = cases.make().arguments("concept_gates")
    monkeypatch.setitem(backend._implementations, "concept_gates", {"reference": backend._implementations["concept_gates"]["reference"]})
    message = "'cuda' was asked for but cannot run this call: no CUDA device is visible. Can run it: "
    with pytest.raises(backend.BackendUnavailable, match=message):
        perfusion_kernels.concept_gates(**arguments, backend="cuda")


# what it takes


def attention(gpu, dtype=torch.half, T=77, d=40, **changes):
    arguments = gpu(cases.make(B=1, T=T, d=d, D=4, N=2, H=1, dtype=dtype).arguments("edited_attention"))
    changed = {name: change(arguments[name]) for name, change in changes.items()}
    return supports.edited_attention(*cases.positional("edited_attention", {**arguments, **changed}))


def test_attention_takes_what_is_compiled(gpu):
    """Whether it fits, the library is asked: tests/cuda_host/test_limits.py."""
    assert attention(gpu, d=32) is None and attention(gpu, d=48) == "it takes d of 32, 40; got 48"
    assert attention(gpu, T=199, dtype=torch.bfloat16) is None
    assert attention(gpu, T=200) == "it takes T up to 199 at d = 40 with 101376 bytes of shared memory a block; got 200"
    assert attention(gpu, dtype=torch.float32) == "it takes query in float16 or bfloat16; got float32"
    double = torch.Tensor.double
    assert attention(gpu, gates=double, components=double) == "it takes gates in float32; got float64"
    assert attention(gpu, value_targets=double) == "it takes value_targets in float16 or bfloat16 or float32; got float64"
    edit = ("gates", "components", "index", "key_outputs", "key_targets", "value_outputs", "value_targets")
    without = dict.fromkeys(edit, lambda tensor: None)
    assert attention(gpu, T=201, **without) is None and "up to 201" in attention(gpu, T=202, **without)


def test_what_autocast_casts_is_taken():
    """By the rule alone, for tensors in host memory: autocast for a GPU is off where there is none."""
    assert supports.halves(query=torch.empty(1)) == "it takes query in float16 or bfloat16; got float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert supports.halves(query=torch.empty(1), key=None, value=torch.empty(1).half()) is None
        assert supports.halves(query=torch.empty(1).double()) == "it takes query in float16 or bfloat16 or float32; got float64"


def test_gates_take_what_is_compiled(gpu):
    def refused(J=2, **changes):
        arguments = gpu(cases.make(J=J, D=4, T=3, B=1).arguments("concept_gates"))
        changed = {name: change(arguments[name]) for name, change in changes.items()}
        return supports.concept_gates(*cases.positional("concept_gates", {**arguments, **changed}))

    assert refused() is None and refused(J=129) is None
    assert refused(J=1, index=lambda index: index.expand(1, 1001)) == "it takes J up to 1000; got 1001"
    assert refused(encodings=torch.Tensor.double) == "it takes encodings in float16 or bfloat16 or float32; got float64"
    assert refused(bias=torch.Tensor.double) == "it takes bias in float32; got float64"


def test_other_devices_are_refused(gpu):
    host = {"x": torch.empty(1)}
    assert supports.anywhere(*host.values()) == "the compiled kernels need tensors on a CUDA device; got cpu"
    assert supports.anywhere(*gpu(host).values()) is None


# and when it is taken


def test_a_call_on_a_gpu_takes_it(registered, gpu):
    arguments = gpu(cases.make(d=40, dtype=torch.half).arguments("edited_attention"))
    chosen = lambda **changes: backend.select("edited_attention", cases.positional("edited_attention", {**arguments, **changes}))  # noqa: E731
    assert chosen() is cases.overload_of("edited_attention", "cuda")
    assert chosen(query=arguments["query"].float()) is not cases.overload_of("edited_attention", "cuda")
    result = perfusion_kernels.edited_attention(**arguments, scale=0.3)
    assert (result.device, result.shape, result.dtype) == (torch.device("cuda:0"), arguments["query"].shape, torch.half)


def test_the_table_decides(registered, gpu, monkeypatch):
    """What would replace the library's product is not chosen, and on a GPU a layer is torch's products around `edited_attention`."""
    case = cases.make(d=40, dtype=torch.half)
    arguments = gpu(case.arguments("edited_projection"))
    call = cases.positional("edited_projection", arguments)
    own = cases.overload_of("edited_projection", "cuda")
    assert backend.select("edited_projection", call) is not own and backend.select("edited_projection", call, "cuda") is own

    layer = gpu(case.arguments("cross_attention_layer"))
    called, select = [], backend.select
    monkeypatch.setattr(backend, "select", lambda *arguments: called.append(select(*arguments)) or called[-1])
    result = perfusion_kernels.cross_attention_layer(**layer)
    assert called == [cases.overload_of("edited_attention", "cuda")]
    assert (result.device, result.shape, result.dtype) == (torch.device("cuda:0"), layer["residual"].shape, torch.half)
    called.clear()
    perfusion_kernels.cross_attention_layer(**layer, backend="reference")
    with perfusion_kernels.use_backend("reference"):
        perfusion_kernels.cross_attention_layer(**layer)
    assert called == [cases.overload_of("cross_attention_layer", "reference")] * 2


def test_every_operator_has_a_row_in_the_table():
    assert set(backend.DEFAULTS) == set(cases.PUBLIC)
    for row in backend.DEFAULTS.values():
        assert row[-1] == "reference" and list(row) == sorted(row, key=backend.ORDER.index)


def test_derivatives_decide(registered, gpu, monkeypatch):
    """A call that will be differentiated goes to who has kernels for that, unless nobody has, or this is asked for by name."""
    operator = importlib.import_module("perfusion_kernels.edited_attention").OPERATOR
    arguments = gpu(cases.make(d=40, dtype=torch.half).arguments("edited_attention"))
    arguments["query"].requires_grad_()
    call = cases.positional("edited_attention", arguments)
    own = cases.overload_of("edited_attention", "cuda")
    assert "triton" in operator.backwards
    assert backend.select("edited_attention", call) is not own and backend.select("edited_attention", call, "cuda") is own
    with torch.no_grad():
        assert backend.select("edited_attention", call) is own
    monkeypatch.delitem(operator.backwards, "triton")
    assert backend.select("edited_attention", call) is own


def test_a_compiled_function_takes_it(registered, gpu):
    """The choice, with all that it asks the library, is traced without a graph break."""
    arguments = gpu(cases.make(d=40, dtype=torch.half).arguments("edited_attention"))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled_function = torch.compile(lambda x: perfusion_kernels.edited_attention(**x, scale=0.3), fullgraph=True, backend=keep)
    assert compiled_function(arguments).device.type == "cuda"
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    own = [target for target in called if "perfusion_kernels" in str(target)]
    assert own == [cases.overload_of("edited_attention", "cuda")]


def test_without_a_library_the_operator_says_so(registered):
    case = cases.make(d=40, dtype=torch.half)
    with pytest.raises(NotImplementedError, match="perfusion_kernels::edited_attention.cuda has no compiled kernel for tensors on cpu"):
        cases.overload_of("edited_attention", "cuda")(*cases.positional("edited_attention", case.arguments("edited_attention")))
