"""What nvcc makes of the kernels, for two architectures: no spills, no local memory, tensor cores, 16-byte accesses.

They are those of the library that test_torch_library.py looks at: nothing is compiled for this.
"""

import re
from dataclasses import replace

import pytest

from bench.kernels import attention_before_after, nvcc_matrix, tile_instructions

from .test_torch_library import compiled  # noqa: F401, a fixture

SASS = """\
\t\tFunction : _ZN9perfusion20concept_gates_kernelIfLi1EEEvNS_18ConceptGatesLaunchE
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x0 */
        /*0008*/                   ACQBULK ;                                 /* 0x0 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64], !P1 ;  /* 0x0 */
        /*0030*/                   LDG.E.LTC128B R4, desc[UR4][R2.64] ;      /* 0x0 */
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;          /* 0x0 */
        /*0050*/               @P2 STL [R1], R4 ;                            /* 0x0 */
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;          /* 0x0 */
        /*0070*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;       /* 0x0 */
"""


@pytest.fixture(scope="module")
def kernels(compiled):  # noqa: F811
    return nvcc_matrix.kernels_of(*compiled)


def test_instructions_are_counted():
    (counts,) = nvcc_matrix.count_instructions(SASS.splitlines()).values()
    assert counts == dict(tensor=1, wide_loads=3, wide_stores=1, local=1, waits=1, unordered=0)
    without = [line for line in SASS.splitlines() if "ACQBULK" not in line]
    assert list(nvcc_matrix.count_instructions(without).values()) == [counts | dict(waits=0, unordered=5)]


def test_what_no_kernel_may_have():
    good = nvcc_matrix.Kernel("edited_attention, float16, 40, 5, 2", "sm_80", registers=96, tensor=1, wide_loads=1, wide_stores=1)
    bad = nvcc_matrix.Kernel(good.name, "sm_80", registers=96, stack=16, spills=20)
    assert nvcc_matrix.violations([replace(good, spills=20, runs=False)]) == []  # no call is for it
    assert nvcc_matrix.violations([good]) == []
    assert nvcc_matrix.violations([bad]) == [
        f"{good.name} for sm_80: {text}"
        for text in ("20 bytes spilled, 16 of stack, 0 local accesses", "no tensor-core instruction", "no 16-byte load", "no 16-byte store")
    ]
    assert nvcc_matrix.violations([nvcc_matrix.Kernel("concept_gates, float32, 1", "sm_80", wide_loads=1)]) == []
    late = nvcc_matrix.Kernel("concept_gates, float32, 1", "sm_90", wide_loads=1, waits=1, unordered=1)
    text = "concept_gates, float32, 1 for sm_90: accesses global memory before griddepcontrol.wait"
    assert nvcc_matrix.violations([late]) == nvcc_matrix.violations([replace(late, waits=0, unordered=0)]) == [text]
    assert nvcc_matrix.violations([replace(late, unordered=0)]) == []


def test_names_are_readable():
    symbols = {
        "_ZN9perfusion23edited_attention_kernelINS_4HalfELi40ELi5ELi2EEEvNS_21EditedAttentionLaunchE": "edited_attention, float16, 40, 5, 2",
        "_ZN9perfusion20concept_gates_kernelIfLi1EEEvNS_18ConceptGatesLaunchE": "concept_gates, float32, 1",
    }
    assert {symbol: nvcc_matrix.readable(*nvcc_matrix.REGISTRY.named(symbol)) for symbol in symbols} == symbols


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN9perfusion10sums_kernelINS_4HalfEEEvv",  # not in TILES
        "_ZN9perfusion23edited_attention_kernelINS_4HalfELi40EEEvv",  # which has a number more there
        "_ZN9perfusion20concept_gates_kernelIdEEvv",  # double
        "_Z3sumv",
    ],
)
def test_a_kernel_that_the_registry_does_not_know_is_refused(symbol):
    with pytest.raises(ValueError, match=f"TILES of csrc/registry.py must name each kernel.*; got {symbol}. Add it there"):
        nvcc_matrix.REGISTRY.named(symbol)


def test_no_kernel_spills_and_all_are_as_wide_as_wanted(kernels):
    assert nvcc_matrix.violations(kernels) == []


def test_the_committed_table_is_of_these_kernels(kernels, compiled):  # noqa: F811
    """Every kernel, and with the same nvcc the same registers; or the page says that there is none. The remedy: nvcc_matrix.py."""
    release, rows = nvcc_matrix.committed()
    if not rows:
        assert f"{nvcc_matrix.BEGIN}\nNot written yet.\n{nvcc_matrix.END}" in nvcc_matrix.PAGE.read_text()
        return
    assert sorted(rows) == sorted({kernel.name for kernel in kernels})
    if compiled[1]["cuda"] == release:
        assert {(k.name, k.arch): rows[k.name].get(k.arch) for k in kernels} == {(k.name, k.arch): k.registers for k in kernels}


def test_the_committed_instructions_are_of_these_sources(compiled):  # noqa: F811
    """Of the loop over tiles, one head width, with the same nvcc. The remedy: attention_before_after.py."""
    page = attention_before_after.PAGE.read_text(encoding="utf-8")
    lines = ["| now | " + " | ".join(map(str, row)) + " |" for row in tile_instructions.rows(nvcc_matrix.ROOT / "csrc", "90", [64])]
    assert len(lines) == 2
    if compiled[1]["cuda"] == nvcc_matrix.committed()[0]:
        assert all(line in page.replace(",", "") for line in lines), lines


def test_gates_of_few_places_take_fewer_than_128_registers():
    """On every architecture, and without a spill, which would be a violation above."""
    rows = {name: registers for name, registers in nvcc_matrix.committed()[1].items() if re.fullmatch(r"concept_gates, \w+, 2", name)}
    assert len(rows) == 3 and all(len(registers) == len(nvcc_matrix.ARCHITECTURES) for registers in rows.values())
    assert max(count for registers in rows.values() for count in registers.values()) < 128


def test_a_written_table_is_read_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc_matrix, "PAGE", tmp_path / "page.md")
    nvcc_matrix.PAGE.write_text(f"before\n{nvcc_matrix.BEGIN}\nNot written yet.\n{nvcc_matrix.END}\nafter\n")
    assert nvcc_matrix.committed() == ("", {})
    kernels = [
        nvcc_matrix.Kernel(name, arch, registers=registers, dynamic=dynamic, tensor=tensor, wide_loads=4)
        for name, dynamic in (("concept_gates, float32, 1", -1), ("edited_attention, float16, 40, 5, 2", 23040))
        for arch, registers, tensor in (("sm_80", 96, 30), ("sm_90", 90, 31))
    ]
    nvcc_matrix.write(kernels, "13.0")
    assert nvcc_matrix.committed() == ("13.0", {kernel.name: {"sm_80": 96, "sm_90": 90} for kernel in kernels})
    text = nvcc_matrix.PAGE.read_text()
    assert "| edited_attention, float16, 40, 5, 2 | 23,040 | 30–31 | 4 | 0 | 96 | 90 |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "Not written" not in text
