"""What every measurement needs: the model, its judge, pictures to learn from, a batched sampler, and a folder that remembers."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.fidelity.scale import Scale
from bench.fidelity.subjects import Target
from perfusion.covariance import Covariance, get_covariance
from perfusion.demo.instances import write_references
from perfusion.models import TOYBOX, load_pipeline, resolve
from perfusion.toybox.judge import Judge, load_judge
from perfusion.toybox.sheets import weights_digest

__all__ = ["Lab"]

BATCH = 32  # pictures drawn at once, of whatever prompts and concepts


class Lab:
    """One model under test. work: a folder for concepts, weights of peers and sheets, each made once.

    digest: 16 hex digits of the weights, which every row carries: rows of other weights are never mixed.
    """

    def __init__(self, scale: Scale, work: Path, *, folder: Path = TOYBOX, device: str | None = None):
        self.scale, self.folder = scale, folder
        self.pipe = load_pipeline(folder, device=device)
        self.device = torch.device(self.pipe._execution_device)
        self.judge: Judge = load_judge(folder / "judge.safetensors")
        self.digest = weights_digest(folder)[:16]
        self.work = work / self.digest
        self.work.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def covariance(self) -> Covariance:
        return get_covariance(self.pipe, progress=False)

    def references(self, target: Target, count: int | None = None, *, masks: bool = True) -> list[Path]:
        """The pictures to learn from, with captions and masks beside them."""
        count = target.pictures if count is None else count
        folder = self.work / "references" / f"{target.name}-{count}{'' if masks else '-unmasked'}"
        paths = [folder / f"{target.name}-{number}.png" for number in range(1, count + 1)]
        if not all(path.exists() for path in paths):
            write_references(target.subject, folder, count)
            for mask in [] if masks else folder.glob("*-masklabel.png"):
                mask.unlink()
        return paths

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], pipe: Any = None, tell: Callable[[int], None] | None = None) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1]. Each depends on its own prompt and seed, whatever shares its batch."""
        pipe, images = pipe or self.pipe, []
        for start in range(0, len(prompts), BATCH):
            chunk = list(prompts[start : start + BATCH])
            images.append(self._sampled(pipe, chunk, seeds[start : start + BATCH], self.scale.sampling_steps))
            if tell is not None:
                tell(len(chunk))
        return torch.cat(images)

    def _sampled(self, pipe: Any, prompts: list[str], seeds: Sequence[int], steps: int) -> Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        dtype = getattr(torch, self.scale.drawn_in)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            drawn = pipe(prompts, num_inference_steps=steps, guidance_scale=self.scale.guidance, generator=noise, output_type="pt")
        return drawn.images.float().cpu()

    def remembered(self, kind: str, key: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The folder and facts of something made by `key`; made now unless it is there."""
        text = json.dumps(key, sort_keys=True, default=str)
        folder = self.work / kind / hashlib.sha256(text.encode()).hexdigest()[:16]
        facts = folder / "facts.json"
        if not facts.exists():
            folder.mkdir(parents=True, exist_ok=True)
            facts.write_text(json.dumps(make(folder) | {"key": key}, default=str))
        return folder, json.loads(facts.read_text())

    def sheet(self, name: str, images: Tensor, columns: int) -> None:
        """Keep pictures to be looked at."""
        rows = [torch.cat(list(part), dim=2) for part in images.split(columns)]
        rows = [torch.nn.functional.pad(row, (0, rows[0].shape[2] - row.shape[2])) for row in rows]
        path = self.work / "sheets" / self.scale.name / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()).save(path)

    def rates(self) -> tuple[float, float]:
        """Processor seconds of one picture, and of one picture in one training step: measured now, in a few seconds."""
        from bench.fidelity.learning import learn_for

        steps, count = 2, BATCH
        started = time.process_time()
        self._sampled(self.pipe, ["a teddy on the beach"] * count, range(count), steps)
        drawn = (time.process_time() - started) / count / steps * self.scale.sampling_steps
        return drawn, learn_for(self, steps=2) / 2


def folder_of(model: str) -> Path:
    """A folder with toybox's parts and its judge. ValueError for another model: those are scored by bench/fidelity/real.py."""
    folder = Path(resolve(model))
    if not (folder / "judge.safetensors").exists():
        raise ValueError(
            f"{model!r} has no judge.safetensors: only toybox's worlds have a judge. Real checkpoints: python -m bench.fidelity.real"
        )
    return folder
