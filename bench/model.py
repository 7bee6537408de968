"""Predicts the cost of a step, a GPU, a node and a fleet: floors, launches, memory. Every assumption is a named parameter.

    python bench/model.py                               # tables
    python bench/model.py --out bench/results/model.jsonl   # the same as rows, which plots and pages read
    python bench/model.py --host-launch 4e-6 --batch 16     # another assumption

Nothing here is measured: rows have "gate": "predicted" and all assumptions, so that a measurement can be compared with them.
FLOPs and operator counts of the UNets are counted (tests/bench/test_model.py counts one of them again, on the meta device).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import roofline  # noqa: E402

T = 77


@dataclass(frozen=True)
class Unet:
    """flops: of a forward of one row. launches: operators that start a kernel, in a forward by diffusers in eager mode. parameters: of
    UNet, text encoders and VAE. lora_bytes: of a LoRA of rank 16 on disk (the suite `storage`)."""

    flops: float
    launches: int
    parameters: float
    latent_pixels: int
    lora_bytes: int


UNETS = {
    "sd15": Unet(0.803e12, 726, 1.07e9, 64 * 64, 6_415_248),
    "sd21": Unet(2.15e12, 742, 1.29e9, 96 * 96, 6_700_000),
    "sdxl": Unet(6.76e12, 1852, 3.47e9, 128 * 128, 46_616_392),
}


@dataclass(frozen=True)
class Assumptions:
    """Seconds, bytes, and bytes or FLOPs per second."""

    memory: float = 141e9  # of one GPU
    memory_bandwidth: float = 4.8e12
    tensor_rate: float = 790e12  # dense products in 16 bits, as large ones reach them
    unet_efficiency: float = 0.5  # of that rate, by all of the UNet but its cross-attention, with many rows ...
    half_rows: float = 2.0  # ... half of it with so many: published steps of 104.6 a second (SD 1.5, the fastest stack) and 14.9 (SDXL)
    core_efficiency: float = 0.6  # of its floor, by the attention core
    stock_core: float = 1.5  # the time of torch's attention kernels, which pad 77 keys to 128, over ours
    product_efficiency: float = 0.6  # of its floor, by to_q and to_out
    host_launch: float = 25e-6  # of the host, for an operator in eager mode: 54.5 steps a second published for SD 1.5 on an H100
    graph_launch: float = 1.3e-6  # of the device, between two kernels of a graph
    layer_launches: int = 5  # of a cross-attention layer of ours: LayerNorm, to_q, core, to_out, residual
    stock_layer_launches: int = 8  # of diffusers': K and V of the text, and a division by the output's factor, as well
    steps: int = 50
    rows_per_image: int = 2  # guidance
    batch: int = 16  # images of one forward
    activations: float = 0.4e9  # bytes of a row of SD 1.5's UNet; others by their latent pixels
    slots: int = 64  # prompts whose keys and values are resident
    reserve: float = 0.08  # of memory, for the allocator
    host_link: float = 50e9  # host to device, pinned
    disk: float = 2e9
    host_memory: float = 1.5e12  # of a node
    gpus: int = 8  # of a node
    nodes: int = 16  # of a fleet
    file_overhead: float = 150e-6  # to open and check a concept file
    lora_fuse: float = 1.7  # seconds to load and fuse a LoRA into SDXL, the least published; SD 1.5 by its parameters
    adapter_launches: int = 7  # that PEFT's mixed batch adds for a layer and an adapter
    unfused_launches: int = 4  # that a LoRA beside its layer adds for a layer and an adapter
    gated_launches: int = 11  # that an edit at every step adds for a projection: similarity, gate, two sums
    lora_layers: tuple[tuple[str, int], ...] = (("sd15", 128), ("sd21", 128), ("sdxl", 560))

    def machine(self) -> roofline.Machine:
        return dataclasses.replace(roofline.H200, bandwidth=self.memory_bandwidth, tensor=self.tensor_rate)


def layer_seconds(model: str, rows: int, a: Assumptions) -> tuple[float, float]:
    """(attention cores, the products around them) of all cross-attention layers in a step, without launches."""
    core = products = 0.0
    for layer in roofline.UNETS[model]:
        work = roofline.edited_attention(B=rows, N=layer.N, T=T, H=layer.H, d=layer.d)
        whole = roofline.cross_attention_layer(B=rows, N=layer.N, C=layer.C, T=T, H=layer.H, d=layer.d)
        core += layer.count * work.floor(a.machine()) / a.core_efficiency
        products += layer.count * (whole.tensor - work.tensor) / a.tensor_rate / a.product_efficiency
    return core, products


def layers(model: str) -> int:
    return sum(layer.count for layer in roofline.UNETS[model])


def step_seconds(model: str, rows: int, a: Assumptions, *, graph: bool, ours: bool = True, adapters: int = 0) -> float:
    """A forward of the UNet. ours: keys and values are stored; else the text is projected at every step. adapters: distinct
    LoRAs of a mixed batch by PEFT. In eager mode the host and the device work at once, so the slower one counts."""
    core, products = layer_seconds(model, rows, a)
    sizes = [(layer.count, dict(B=rows, N=layer.N, C=layer.C, T=T, H=layer.H, d=layer.d)) for layer in roofline.UNETS[model]]
    cross = sum(count * roofline.cross_attention_layer(**each).flops for count, each in sizes)
    efficiency = a.unet_efficiency * rows / (rows + a.half_rows)
    device = (UNETS[model].flops * rows - cross) / (a.tensor_rate * efficiency) + core + products
    launches = UNETS[model].launches
    if ours:
        launches -= layers(model) * (a.stock_layer_launches - a.layer_launches)
    else:
        device += (a.stock_core - 1) * core
        width = roofline.TEXT_WIDTHS[model]
        text = sum(layer.count * 4 * rows * T * width * layer.C for layer in roofline.UNETS[model])
        device += text / (a.tensor_rate * a.product_efficiency)
    launches += adapters * a.adapter_launches * dict(a.lora_layers)[model]
    return device + launches * a.graph_launch if graph else max(device + launches * a.graph_launch, launches * a.host_launch)


def edit_seconds(model: str, rows: int, concepts: int, a: Assumptions) -> float:
    """Time that editing keys and values on loading adds to the attention cores of a step (DESIGN.md, the form "schedule")."""
    seconds = 0.0
    for layer in roofline.UNETS[model]:
        plain, edited = (roofline.edited_attention(B=rows, N=layer.N, T=T, H=layer.H, d=layer.d, J=J) for J in (0, concepts))
        seconds += layer.count * (edited.floor(a.machine()) - plain.floor(a.machine())) / a.core_efficiency
    return seconds


def concepts_over_stock(model: str, rows: int, concepts: int, a: Assumptions) -> dict[str, float]:
    """An eager step with so many concepts in each row, over the stock pipeline's without one, by how the concepts get there."""

    def eager(device: float, launches: int) -> float:
        return max(device + launches * a.graph_launch, launches * a.host_launch)

    stock = step_seconds(model, rows, a, graph=False, ours=False)
    slots = step_seconds(model, rows, a, graph=False)
    launches = UNETS[model].launches
    ours = launches - layers(model) * (a.stock_layer_launches - a.layer_launches)
    busy = step_seconds(model, rows, a, graph=True, ours=False) - launches * a.graph_launch
    ours_busy = step_seconds(model, rows, a, graph=True) - ours * a.graph_launch
    lora = launches + concepts * a.unfused_launches * dict(a.lora_layers)[model]
    gated = launches + 2 * layers(model) * a.gated_launches
    return {
        "perfusion, slots": slots / stock,
        "perfusion, schedule": eager(ours_busy + edit_seconds(model, rows, concepts, a), ours + 1) / stock,
        "gated edit": eager(busy, gated) / stock,
        "LoRA": eager(busy, lora) / stock,
    }


def concept_bytes(model: str) -> int:
    """Of a slot of the bank: three float32 vectors of the text's width; values and projected targets of all layers in 16 bits."""
    outputs = sum(layer.count * layer.C for layer in roofline.UNETS[model])
    return 3 * 4 * roofline.TEXT_WIDTHS[model] + 2 * 2 * outputs


def slot_bytes(model: str) -> int:
    """Of a prompt's keys and values in all layers."""
    return 2 * 2 * T * sum(layer.count * layer.C for layer in roofline.UNETS[model])


def resident_concepts(model: str, a: Assumptions) -> int:
    """On one GPU, beside the model, the activations of a batch and the prompts' slots."""
    unet = UNETS[model]
    activations = a.activations * unet.latent_pixels / UNETS["sd15"].latent_pixels * a.batch * a.rows_per_image
    free = a.memory * (1 - a.reserve) - 2 * unet.parameters - activations - a.slots * slot_bytes(model)
    return max(0, int(free // concept_bytes(model)))


def images_per_second(model: str, a: Assumptions, *, graph: bool = True) -> float:
    return a.batch / (a.steps * step_seconds(model, a.batch * a.rows_per_image, a, graph=graph))


def miss_seconds(model: str, a: Assumptions, *, on_disk: bool) -> float:
    """A concept that is not resident: its bytes over the link, from disk as a file before."""
    seconds = concept_bytes(model) / a.host_link + 5 * a.host_launch
    return seconds + (a.file_overhead + concept_bytes(model) / a.disk if on_disk else 0)


def lora_seconds(model: str, a: Assumptions) -> float:
    return a.lora_fuse * UNETS[model].parameters / UNETS["sdxl"].parameters


def predictions(a: Assumptions) -> Iterator[dict[str, Any]]:
    """Rows: case, what, value, unit."""
    for model in roofline.UNETS:
        for rows in (1, 2, 4, 8, 16, 32):
            for graph in (False, True):
                ours, stock = (step_seconds(model, rows, a, graph=graph, ours=flag) for flag in (True, False))
                mode = "graph" if graph else "eager"
                yield row(model, f"step, {mode}, {rows} rows", 1e3 * ours, "ms", rows=rows)
                yield row(model, f"step over stock diffusers, {mode}, {rows} rows", ours / stock, "ratio", rows=rows)
        for tenants in (1, 2, 4, 8, 16, 32, 64):
            rows = tenants * a.rows_per_image
            alone = step_seconds(model, rows, a, graph=False)
            mixed = step_seconds(model, rows, a, graph=False, ours=False, adapters=tenants)
            yield row(model, f"tenants, {tenants}", 1.0, "ratio", tenants=tenants, provider="perfusion")
            yield row(model, f"tenants, {tenants}", mixed / alone, "ratio", tenants=tenants, provider="PEFT mixed batch")
        for concepts in (1, 2, 4, 8):
            for provider, ratio in concepts_over_stock(model, 2, concepts, a).items():
                yield row(model, f"concepts, {concepts}", ratio, "ratio", concepts=concepts, provider=provider)
        yield row(model, "bytes of a resident concept", concept_bytes(model), "bytes")
        yield row(model, "bytes of a prompt's keys and values", slot_bytes(model), "bytes")
        yield row(model, "concepts on one GPU", resident_concepts(model, a), "concepts")
        yield row(model, "concepts in a node's memory", int(a.host_memory // concept_bytes(model)), "concepts")
        yield row(model, "images, one GPU", images_per_second(model, a), "1/s")
        yield row(model, "images, a node", images_per_second(model, a) * a.gpus, "1/s")
        yield row(model, "images, a fleet", images_per_second(model, a) * a.gpus * a.nodes, "1/s")
        yield row(model, "a miss, from the host's memory", 1e6 * miss_seconds(model, a, on_disk=False), "µs")
        yield row(model, "a miss, from disk", 1e6 * miss_seconds(model, a, on_disk=True), "µs")
        yield row(model, "a LoRA loaded and fused", 1e6 * lora_seconds(model, a), "µs")


def row(model: str, what: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    return {
        "suite": "model", "case": model, "provider": "perfusion", "dtype": "bfloat16", "device": roofline.H200.name, "gate": "predicted",
        "what": what, "value": float(f"{value:.4g}"), "unit": unit, **more,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: what one GPU, a node and a fleet serve, a column per model."""
    values = {(each["what"], each["case"]): each for each in found}
    models = list(dict.fromkeys(each["case"] for each in found))
    wanted = [
        *(f"step, {mode}, {rows} rows" for rows in (2, 32) for mode in ("eager", "graph")),
        *(f"step over stock diffusers, {mode}, {rows} rows" for mode, rows in (("eager", 2), ("graph", 32))),
        "images, one GPU", "images, a node", "images, a fleet", "bytes of a resident concept", "concepts on one GPU",
        "concepts in a node's memory", "a miss, from the host's memory", "a miss, from disk", "a LoRA loaded and fused",
    ]  # fmt: skip
    lines = [f"| predicted | {' | '.join(models)} | unit |", "|---" * (len(models) + 2) + "|"]
    for what in wanted:
        cells = [_said(values[what, model]["value"]) for model in models]
        lines.append(f"| {what} | {' | '.join(cells)} | {values[what, models[0]]['unit']} |")
    return "\n".join(lines)


def _said(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a .jsonl file, written anew")
    fields = [field for field in dataclasses.fields(Assumptions) if field.name != "lora_layers"]
    for field in fields:
        kind = int if field.type == "int" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=f"default {field.default:g}")
    options = parser.parse_args()
    assumptions = Assumptions(**{field.name: getattr(options, field.name) for field in fields})
    found = list(predictions(assumptions))
    if options.out is None:
        print(table(found))
        return
    from bench import rows

    options.out.unlink(missing_ok=True)
    named = dataclasses.asdict(assumptions)
    for each in found:
        rows.append(options.out, {**each, "assumptions": named})


if __name__ == "__main__":
    main()
