"""What nvcc makes of the kernels, for two architectures: no spills, no local memory, tensor cores, 16-byte accesses."""

import importlib.util
import shutil

import pytest

from .build import ROOT, _texts, only_widths

spec = importlib.util.spec_from_file_location("nvcc_matrix", ROOT / "bench" / "kernels" / "nvcc_matrix.py")
nvcc_matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nvcc_matrix)

PTXAS = """\
ptxas info    : Compiling entry function '_ZN9perfusion23edited_attention_kernelINS_4HalfELi40ELi5EEEvNS_21EditedAttentionLaunchE' for 'sm_80'
ptxas info    : Function properties for _ZN9perfusion23edited_attention_kernelINS_4HalfELi40ELi5EEEvNS_21EditedAttentionLaunchE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 912 bytes cmem[0]
"""
SASS = """\
\t\tFunction : _ZN9perfusion20concept_gates_kernelIfEEvNS_18ConceptGatesLaunchE
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x0 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64], !P1 ;  /* 0x0 */
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;              /* 0x0 */
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;          /* 0x0 */
        /*0050*/               @P2 STL [R1], R4 ;                            /* 0x0 */
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;          /* 0x0 */
"""


def test_spills_are_read_and_refused():
    (kernel,) = nvcc_matrix.parse_resources(PTXAS, "80").values()
    assert (kernel.name, kernel.registers, kernel.stack, kernel.spills) == ("edited_attention, float16, 40, 5", 96, 16, 20)
    assert nvcc_matrix.complaints([kernel])[0] == "edited_attention, float16, 40, 5 for 80: 20 bytes spilled, 16 of stack, 0 local accesses"


def test_instructions_are_counted():
    (counts,) = nvcc_matrix.count_instructions(SASS).values()
    assert counts == dict(tensor=1, wide_loads=2, wide_stores=1, local=1)


@pytest.mark.parametrize("arch", ("80", "90a"))
def test_nothing_spills(arch, tmp_path):
    """The widest heads, and those that end in a half product."""
    for name, text in _texts(only_widths(40, 160)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    names = [name for name in nvcc_matrix.SOURCES if "float16" not in name or "bfloat16" in name]
    sources = [tmp_path / "csrc" / name for name in names]
    if shutil.which("nvcc") is None:  # then there is nothing to look at, and the script says so
        with pytest.raises(FileNotFoundError, match="nvcc"):
            nvcc_matrix.compile_all(sources, [arch])
        return
    kernels = nvcc_matrix.compile_all(sources, [arch])
    assert len(kernels) == 3 + 6 + 8 + 6 + 4 + (8 + 6 + 4)
    assert nvcc_matrix.complaints(kernels) == []
