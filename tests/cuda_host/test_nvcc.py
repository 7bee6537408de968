"""What nvcc makes of the kernels, for two architectures: no spills, no local memory, tensor cores, 16-byte accesses.

They are those of the library that test_torch_library.py looks at: nothing is compiled for this.
"""

import pytest
import torch

from bench.kernels import nvcc_matrix

from ..kernels import cases
from .test_torch_library import compiled  # noqa: F401, a fixture

SASS = """\
\t\tFunction : _ZN9perfusion20concept_gates_kernelIfEEvNS_18ConceptGatesLaunchE
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x0 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64], !P1 ;  /* 0x0 */
        /*0030*/                   LDG.E.LTC128B R4, desc[UR4][R2.64] ;      /* 0x0 */
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;          /* 0x0 */
        /*0050*/               @P2 STL [R1], R4 ;                            /* 0x0 */
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;          /* 0x0 */
"""


@pytest.fixture(scope="module")
def kernels(compiled):  # noqa: F811
    return nvcc_matrix.kernels_of(*compiled)


def test_instructions_are_counted():
    (counts,) = nvcc_matrix.count_instructions(SASS.splitlines()).values()
    assert counts == dict(tensor=1, wide_loads=2, wide_stores=1, local=1)


def test_what_no_kernel_may_have():
    good = nvcc_matrix.Kernel("edited_attention, float16, 40, 5", "sm_80", registers=96, tensor=1, wide_loads=1, wide_stores=1)
    bad = nvcc_matrix.Kernel(good.name, "sm_80", registers=96, stack=16, spills=20)
    assert nvcc_matrix.complaints([good]) == []
    assert nvcc_matrix.complaints([bad]) == [
        f"{good.name} for sm_80: {text}"
        for text in ("20 bytes spilled, 16 of stack, 0 local accesses", "no tensor-core instruction", "no 16-byte load", "no 16-byte store")
    ]
    assert nvcc_matrix.complaints([nvcc_matrix.Kernel("concept_gates, float32", "sm_80", wide_loads=1)]) == []


def test_names_are_readable():
    assert nvcc_matrix.readable("edited_attention_kernel<Half, 40, 5>") == "edited_attention, float16, 40, 5"
    assert nvcc_matrix.readable("concept_gates_kernel<float>") == "concept_gates, float32"
    assert nvcc_matrix.readable("sum_kernel") == "sum"


def test_no_kernel_spills_and_all_are_as_wide_as_wanted(kernels):
    assert nvcc_matrix.complaints(kernels) == []


def test_the_committed_table_is_of_these_kernels(kernels, compiled):  # noqa: F811
    """Every kernel, and with the same nvcc the same registers; or the page says that there is none. The remedy: nvcc_matrix.py."""
    release, rows = nvcc_matrix.committed()
    if not rows:
        assert f"{nvcc_matrix.BEGIN}\nNot written yet.\n{nvcc_matrix.END}" in nvcc_matrix.PAGE.read_text()
        return
    assert sorted(rows) == sorted({kernel.name for kernel in kernels})
    if compiled[1]["cuda"] == release:
        assert {(k.name, k.arch): rows[k.name].get(k.arch) for k in kernels} == {(k.name, k.arch): k.registers for k in kernels}


def test_a_written_table_is_read_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc_matrix, "PAGE", tmp_path / "page.md")
    nvcc_matrix.PAGE.write_text(f"before\n{nvcc_matrix.BEGIN}\nNot written yet.\n{nvcc_matrix.END}\nafter\n")
    assert nvcc_matrix.committed() == ("", {})
    kernels = [
        nvcc_matrix.Kernel(name, arch, registers=registers, tensor=tensor, wide_loads=4)
        for name in ("concept_gates, float32", "edited_attention, float16, 40, 5")
        for arch, registers, tensor in (("sm_80", 96, 30), ("sm_90a", 90, 31))
    ]
    nvcc_matrix.write(kernels, "13.0")
    assert nvcc_matrix.committed() == ("13.0", {kernel.name: {"sm_80": 96, "sm_90a": 90} for kernel in kernels})
    text = nvcc_matrix.PAGE.read_text()
    assert "| edited_attention, float16, 40, 5 | 23,040 | 30–31 | 4 | 0 | 96 | 90 |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "Not written" not in text


@pytest.mark.parametrize("d, groups", [(40, 5), (64, 16), (128, 10), (160, 5)])
def test_shared_memory_is_that_of_the_plans(host, d, groups):
    case = cases.make(B=1, T=16 * groups, N=129, H=1, d=d, D=11, J=1, dtype=torch.float16)
    host.configure(1)
    plans = {"edited_attention": host.plan, "fused_edited_attention": host.fused_plan}
    for operator, plan in plans.items():
        plain = ("query", "key", "value", "encodings", "key_weight", "value_weight")
        arguments = {name: tensor for name, tensor in case.arguments(operator).items() if name in plain}
        assert nvcc_matrix.shared_memory(f"{operator}, float16, {d}, {groups}") == plan(**arguments)["bytes"]
    layer = case.arguments("cross_attention_layer")
    absorbed = {**layer, "query_weight": None, "output_weight": None}
    for multiprocessors in (1, 64):  # tall tiles and flat ones
        host.configure(multiprocessors)
        for arguments, first, second in ((layer, f"attend, float16, {d}, {groups}", 0), (absorbed, f"weigh, float16, {groups}", 1)):
            plan = host.layer_plan(**arguments)
            assert plan["rows"] == plan["second_rows"] == (64 if multiprocessors == 1 else 32)
            assert nvcc_matrix.shared_memory(f"cross_attention_layer_{first}, {plan['rows']}") == plan["bytes"]
            second = f"cross_attention_layer_project, float16, {second}, {plan['second_rows']}"
            assert nvcc_matrix.shared_memory(second) == plan["second_bytes"]
