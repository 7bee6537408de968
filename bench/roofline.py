"""Bytes and FLOPs of an operator's call, and the least time in which a machine could do it. Arithmetic only.

    work = roofline.edited_attention(B=2, N=4096, T=77, H=8, d=40)
    work = roofline.of("edited_attention", arguments)      # from a call's tensors by name, as the cases of the tests have them
    work.bytes, work.flops, work.floor(roofline.H200)      # a floor in seconds

Bytes are the least: every input that the call must read, and every result, once. FLOPs are the formula's own, counted as two
per multiply-accumulate, no padding. A floor is not an estimate but a lower bound for this formula on this machine. Letters
are those of DESIGN.md; `size` is of an element in bytes, `table` of one of a bank's outputs and projected targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Machine:
    name: str
    bandwidth: float  # bytes of device memory per second
    tensor: float  # FLOP/s of dense 16-bit matrix instructions, as matrix products reach them
    scalar: float  # FLOP/s in float32
    exponentials: float  # per second


# 4.8 TB/s and 67 TFLOP/s are NVIDIA's, 790 TFLOP/s is what large bf16 products reach; 132 multiprocessors, 16 exponentials a clock
H200 = Machine("H200", 4.8e12, 790e12, 67e12, 3.6e12)


@dataclass(frozen=True)
class Work:
    """What one call must do, and `issued`, which the kernels in csrc/ do: FLOPs of their matrix instructions, with all padding."""

    read: int = 0  # bytes
    written: int = 0  # bytes
    tensor: int = 0  # FLOPs that matrix instructions can do: factors of 16 bits
    scalar: int = 0  # FLOPs in float32
    exponentials: int = 0
    issued: int | None = None  # None: no kernel in csrc/ or none that this model knows

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def flops(self) -> int:
        return self.tensor + self.scalar

    def times(self, machine: Machine) -> dict[str, float]:
        """Seconds that each of the machine's resources needs, by its name."""
        return {
            "bandwidth": self.bytes / machine.bandwidth,
            "tensor": self.tensor / machine.tensor,
            "scalar": self.scalar / machine.scalar,
            "exponentials": self.exponentials / machine.exponentials,
        }

    def floor(self, machine: Machine = H200) -> float:
        """Seconds, if all resources work at once and none waits."""
        return max(self.times(machine).values())


@dataclass(frozen=True)
class Concepts:
    """The number of concepts in a batch, on which the bytes read from a bank depend."""

    rows: int  # batch rows with at least one
    places: int  # used places, over all rows
    pairs: int  # the sum of the squares of a row's used places
    slots: int  # different slots

    @staticmethod
    def all(B: int, J: int) -> Concepts:
        """Every place used, each by a concept of its own."""
        return Concepts(B if J else 0, B * J, B * J * J, B * J)

    @staticmethod
    def of(index: Sequence[Sequence[int]]) -> Concepts:
        """Of an index [B, J], -1 for none."""
        used = [[slot for slot in row if slot >= 0] for row in index]
        together = [slot for row in used for slot in row]
        return Concepts(sum(map(bool, used)), len(together), sum(len(row) ** 2 for row in used), len(set(together)))


def concept_gates(*, B: int, T: int, D: int, J: int, size: int = 2, concepts: Concepts | None = None) -> Work:
    """Gates and components (DESIGN.md, (5)). Sums are float32, whatever the size; a row without a concept is not read."""
    c = Concepts.all(B, J) if concepts is None else concepts
    return Work(
        read=c.rows * T * D * size + c.slots * D * 2 * 4 + B * J * 4 + c.places * 2 * 4,
        written=B * T * J * 2 * 4,
        scalar=2 * c.places * T * D + 2 * c.pairs * (D + T),  # similarities; the Gram matrix and the solves
        exponentials=c.places * T,
        issued=0,
    )


def edited_projection(
    *, B: int, T: int, D: int, O: int, J: int = 0, size: int = 2, table: int | None = None, concepts: Concepts | None = None
) -> Work:
    """e Wᵀ and the edit of its result (DESIGN.md, (10))."""
    product = _matrix(2 * B * T * D * O, size)
    edit = _edit(B, T, O, J, 1, size if table is None else table, concepts)
    return _sum(product, edit, Work(read=(B * T * D + O * D) * size, written=B * T * O * size))


def edited_attention(
    *, B: int, N: int, T: int, H: int, d: int, J: int = 0, sides: int = 2, size: int = 2, table: int | None = None,
    concepts: Concepts | None = None,
) -> Work:  # fmt: skip
    """softmax(scale q K̃ᵀ) Ṽ (DESIGN.md, (12)). `sides`: 2 if both K and V are edited. J = 0 is plain attention."""
    O = H * d
    edit = _edit(B, T, O, J, sides, size if table is None else table, concepts)
    work = _sum(_attention(B, N, T, H, d, size), edit, Work(read=B * (N + 2 * T) * O * size, written=B * N * O * size))
    return replace(work, issued=4 * B * H * _up(N, 16) * (80 if T <= 80 else _up(T, 16)) * d if size == 2 else None)


def fused_edited_attention(
    *, B: int, N: int, T: int, D: int, H: int, d: int, J: int = 0, sides: int = 2, size: int = 2, table: int | None = None,
    concepts: Concepts | None = None,
) -> Work:  # fmt: skip
    """The same with K = e W_Kᵀ and V = e W_Vᵀ, which are neither read nor written."""
    O = H * d
    edit = _edit(B, T, O, J, sides, size if table is None else table, concepts)
    projections = _matrix(4 * B * T * D * O, size)
    moved = Work(read=(B * N * O + B * T * D + 2 * O * D) * size, written=B * N * O * size)
    return _sum(projections, edit, _attention(B, N, T, H, d, size), moved)


def cross_attention_layer(
    *, B: int, N: int, C: int, T: int, H: int, d: int | None = None, bias: bool = True, residual: bool = True, size: int = 2
) -> Work:
    """to_q, attention, to_out, bias and residual (DESIGN.md, (15)); d = None is its absorbed form, (16)."""
    moved = Work(read=(B * N * C * (2 if residual else 1) + (C if bias else 0)) * size, written=B * N * C * size)
    if d is None:
        return _sum(moved, _attention(B, N, T, H, C, size), Work(read=2 * B * T * H * C * size))
    O = H * d
    projections = _matrix(4 * B * N * C * O, size)
    return _sum(moved, projections, _attention(B, N, T, H, d, size), Work(read=(2 * O * C + 2 * B * T * O) * size))


def edited_attention_backward(*, B: int, N: int, T: int, H: int, d: int, size: int = 2) -> Work:
    """dq, dK and dV without an edit (DESIGN.md, (13) and (14)): five products, of which one is that of the scores again."""
    inputs, results = B * (2 * N + 2 * T) * H * d, B * (N + 2 * T) * H * d
    products = _matrix(10 * B * N * T * H * d, size)
    return _sum(products, Work(read=inputs * size, written=results * size, exponentials=B * N * T * H))


def concept_gates_backward(*, B: int, T: int, D: int, J: int, size: int = 2) -> Work:
    """Its derivatives to encodings, targets, metric targets, bias and temperature, every place with a concept of its own."""
    tables, coefficients = B * J * D * 2 * 4, B * T * J * 2 * 4
    forward = concept_gates(B=B, T=T, D=D, J=J, size=size)
    return Work(
        read=forward.read + coefficients, written=B * T * D * size + tables + B * J * 2 * 4,
        scalar=forward.scalar + 4 * B * J * T * D + 4 * B * J * J * D, exponentials=B * J * T,
    )  # fmt: skip


def edited_projection_backward(*, B: int, T: int, D: int, O: int, J: int, size: int = 2) -> Work:
    """Its derivatives to encodings, gates, components and both tables, every place with a concept of its own."""
    coefficients, tables = 2 * B * T * J * 4, 2 * B * J * O * size
    products = 2 * B * T * O * D
    return Work(
        read=(B * T * O + O * D) * size + tables + coefficients + B * J * 4, written=B * T * D * size + coefficients + tables,
        tensor=products, scalar=8 * B * T * J * O,
    )  # fmt: skip


def edited_projection_backward_launches(*, B: int, T: int, D: int, O: int, J: int, splits: int, size: int = 2) -> tuple[Work, ...]:
    """Bytes of the launches of csrc/edited_projection_backward.cu and csrc/rank_one_backward.cuh, every place with a concept of its own:
    parts of the encodings' gradient, their sum, the gradients of gates and components, and those of the tables."""
    gradient, parts = B * T * O * size, splits * B * T * _up(D, 8) * 4
    coefficients, tables, index = 2 * B * T * J * 4, 2 * B * J * O * size, B * J * 4
    return (
        Work(read=gradient + O * D * size, written=parts),
        Work(read=parts, written=B * T * D * size),
        Work(read=gradient + tables + index, written=coefficients),
        Work(read=gradient + coefficients + index, written=tables),
    )


def of(operator: str, arguments: Mapping) -> Work:
    """The work of a call, from its arguments by name: tensors, with None or nothing for those left out."""
    given = {name: value for name, value in arguments.items() if value is not None}

    def shape(name: str) -> tuple[int, ...]:
        return tuple(given[name].shape)

    edit = {}
    if "index" in given:
        edit = dict(J=shape("index")[1], concepts=Concepts.of(given["index"].tolist()))
        tables = [given[name].element_size() for name in ("outputs", "key_outputs", "value_outputs") if name in given]
        edit |= dict(table=tables[0]) if tables else {}
    if operator == "concept_gates":
        B, T, D = shape("encodings")
        return concept_gates(B=B, T=T, D=D, size=given["encodings"].element_size(), **edit)
    if operator in ("edited_projection", "fused_edited_projection"):  # which differ in roundings alone
        (B, T, D), O = shape("encodings"), shape("weight")[0]
        return edited_projection(B=B, T=T, D=D, O=O, size=given["encodings"].element_size(), **edit)
    if operator == "cross_attention_layer":
        (B, N, C), (_, T, H, d) = shape("hidden_states"), shape("key")
        return cross_attention_layer(
            B=B, N=N, C=C, T=T, H=H, d=d if "query_weight" in given else None, bias="output_bias" in given, residual="residual" in given,
            size=given["hidden_states"].element_size(),
        )  # fmt: skip
    B, N, H, d = shape("query")
    edit |= dict(sides=("key_outputs" in given) + ("value_outputs" in given), size=given["query"].element_size())
    if operator == "edited_attention":
        return edited_attention(B=B, N=N, T=shape("key")[1], H=H, d=d, **edit)
    if operator == "fused_edited_attention":
        _, T, D = shape("encodings")
        return fused_edited_attention(B=B, N=N, T=T, D=D, H=H, d=d, **edit)
    raise ValueError(f"operator must be one with a model here; got {operator}")


def _matrix(flops: int, size: int) -> Work:
    """Products of operands of this size: of 16 bits by tensor cores, wider ones by scalar multiply-adds."""
    return Work(tensor=flops) if size == 2 else Work(scalar=flops)


def _attention(B: int, N: int, T: int, H: int, d: int, size: int) -> Work:
    return replace(_matrix(4 * B * N * T * H * d, size), exponentials=B * N * T * H)


def _edit(B: int, T: int, O: int, J: int, sides: int, table: int, concepts: Concepts | None) -> Work:
    """Σ_j (g_j o_j - a_j p_j) on `sides` results [B, T, O]: two tables each, gates and components, the index."""
    if J == 0 or sides == 0:
        return Work()
    c = Concepts.all(B, J) if concepts is None else concepts
    return Work(read=c.slots * O * 2 * sides * table + c.places * T * 2 * 4 + B * J * 4, scalar=4 * c.places * T * O * sides)


def _sum(*parts: Work) -> Work:
    names = ("read", "written", "tensor", "scalar", "exponentials")
    return Work(**{name: sum(getattr(part, name) for part in parts) for name in names})


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


@dataclass(frozen=True)
class Layer:
    """One kind of cross-attention layer of a UNet, and how many of it there are."""

    N: int
    C: int
    H: int
    count: int
    d: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "d", self.C // self.H)


UNETS = {  # at 512², 768² and 1024² pixels
    "sd15": (Layer(4096, 320, 8, 5), Layer(1024, 640, 8, 5), Layer(256, 1280, 8, 5), Layer(64, 1280, 8, 1)),
    "sd21": (Layer(9216, 320, 5, 5), Layer(2304, 640, 10, 5), Layer(576, 1280, 20, 5), Layer(144, 1280, 20, 1)),
    "sdxl": (Layer(4096, 640, 10, 10), Layer(1024, 1280, 20, 60)),
}
TEXT_WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
