"""Real checkpoints: the benchmark of DreamBooth (arXiv 2208.12242), 30 subjects × 25 prompts × 4 pictures, scored by CLIP and DINO.

    python -m bench.fidelity.real --model dreamshaper_8.safetensors --data dreambooth/dataset --clip CLIP --dino DINO

data   the benchmark's folder: one folder of pictures per subject, and prompts_and_classes.txt, which says each subject's class and the
       prompts of things and of living things (github.com/google/dreambooth)
clip   folder or id of a CLIPModel; the benchmark's is ViT-B/32.    dino   of a ViT; the benchmark's is DINO ViT-S/16

Per subject a concept is trained, and for each β of --bias a row is appended: DINO and CLIP-I, the mean cosine of every drawn picture with
every real one; CLIP-T, of the picture with its prompt in which the class stands for the word. A row of the plain class word stands beside
them, and one of the real pictures among themselves, the ceiling of DINO and CLIP-I. Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from bench import rows  # noqa: E402
from bench.fidelity.judging import spread  # noqa: E402
from perfusion.concept import Concept  # noqa: E402
from perfusion.handle import attach  # noqa: E402
from perfusion.models import load_pipeline  # noqa: E402
from perfusion.pictures import is_picture, open_picture  # noqa: E402
from perfusion.training import train  # noqa: E402

LISTING = "prompts_and_classes.txt"
LIVING = ("cat", "dog")  # classes that get the prompts of living things
PICTURES, BATCH = 4, 4  # per prompt; at once


class Scorer:
    """CLIP and DINO features, unit length; either may be missing."""

    def __init__(self, clip: str | None, dino: str | None, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.device, self.clip, self.dino = device, None, None
        if clip:
            self.clip = CLIPModel.from_pretrained(clip).to(device).eval()
            self.clip_images, self.clip_text = CLIPImageProcessor.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
        if dino:
            self.dino, self.dino_images = AutoModel.from_pretrained(dino).to(device).eval(), AutoImageProcessor.from_pretrained(dino)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """ "CLIP-I" and "DINO" -> [n, d]."""
        found = {}
        if self.clip is not None:
            pixels = self.clip_images(list(pictures), return_tensors="pt").pixel_values.to(self.device)
            pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
            found["CLIP-I"] = normalize(self.clip.visual_projection(pooled).float(), dim=1).cpu()
        if self.dino is not None:
            pixels = self.dino_images(list(pictures), return_tensors="pt").pixel_values.to(self.device)
            found["DINO"] = normalize(self.dino(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=1).cpu()
        return found

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor | None:
        if self.clip is None:
            return None
        tokens = self.clip_text(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return normalize(self.clip.text_projection(self.clip.text_model(**tokens).pooler_output).float(), dim=1).cpu()


def read_listing(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Subject -> class, and "object" and "live" -> prompts with {} for the word. ValueError if it is not the benchmark's listing."""
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    things, _, living = text.partition("Live Subject Prompts")
    found = {
        kind: [each.replace("{0} {1}", "{}") for each in re.findall(r"""['"]([^'"\n]*\{0\} \{1\}[^'"\n]*)['"]\.format""", part)]
        for kind, part in (("object", things), ("live", living))
    }
    if not classes or not all(found.values()):
        raise ValueError(
            f"{LISTING} must name each subject as 'subject,class' and hold both lists of prompts, as the benchmark's does; found "
            f"{len(classes)} subjects, {len(found['object'])} prompts of things and {len(found['live'])} of living things."
        )
    return classes, found


def scores(scorer: Scorer, drawn: Sequence[Image.Image], real: dict[str, Tensor], texts: Sequence[str]) -> dict[str, list[float]]:
    """Of each picture: its mean cosine with all real ones, by each model, and its cosine with its text."""
    features = scorer.images(drawn)
    found = {name: (own @ real[name].T).mean(1).tolist() for name, own in features.items()}
    words = scorer.text(texts)
    if words is not None:
        found["CLIP-T"] = (features["CLIP-I"] * words).sum(1).tolist()
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def ceiling(real: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each real picture its mean cosine with the others."""
    return {
        name: [round(value, 4) for value in ((own @ own.T).sum(1).sub(1) / max(1, len(own) - 1)).tolist()] for name, own in real.items()
    }


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
        images += pipe(list(prompts[start : start + BATCH]), num_inference_steps=steps, generator=generators).images
    return images


def measure(pipe: Any, scorer: Scorer, subject: str, superclass: str, prompts: Sequence[str], options: argparse.Namespace) -> list[dict]:
    """All rows of a subject."""
    files = sorted(path for path in (options.data / subject).iterdir() if is_picture(path))
    real = scorer.images([open_picture(path) for path in files])
    name = re.sub(r"[^a-z0-9_-]", "-", subject.lower())[:32]
    file = options.work / name / f"{name}.safetensors"
    if not file.exists():
        train(
            pipe, files, superclass, name, options.train_steps, output=file.parent, clipseg=options.clipseg, overwrite=True,
            low_memory=options.low_memory, validation_every=0, tensorboard=False,
        )  # fmt: skip
    texts = [prompt for prompt in prompts for _ in range(PICTURES)]
    seeds = [zlib.crc32(f"{prompt} {number}".encode()) for prompt in prompts for number in range(PICTURES)]
    plain = [text.format(superclass) for text in texts]
    facts = {"subject": subject, "superclass": superclass, "pictures": len(files)}
    made = [{**facts, "variant": "real pictures", "scores": ceiling(real)}]
    made.append({**facts, "variant": "class word", "scores": scores(scorer, draw(pipe, plain, seeds, options.steps), real, plain)})
    with attach(pipe) as handle:
        handle.load(Concept.load(file), name)
        for bias in options.bias or [None]:
            word = f"<{name}>" if bias is None else f"<{name}|bias={bias:g}>"
            drawn = draw(pipe, [text.format(word) for text in texts], seeds, options.steps)
            said = "perfusion" if bias is None else f"perfusion, β = {bias:g}"
            made.append({**facts, "variant": said, "bytes": file.stat().st_size, "scores": scores(scorer, drawn, real, plain)})
    return made


def table(found: Sequence[dict[str, Any]]) -> str:
    """Means over subjects with 95 % intervals."""
    names = list(dict.fromkeys(name for row in found for name in row["scores"]))
    lines = [f"| | {' | '.join(names)} | subjects |", "|---" * (len(names) + 2) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in found):
        own = [row for row in found if row["variant"] == variant]
        cells = [spread([row["scores"].get(name, []) for row in own]) for name in names]
        lines.append(f"| {variant} | {' | '.join('' if m != m else f'{m:.3f} ({a:.3f}–{b:.3f})' for m, a, b in cells)} | {len(own)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not (options.clip or options.dino):
        raise SystemExit("--clip, --dino or both must be given: without one there is nothing to score with.")
    try:
        classes, prompts = read_listing((options.data / LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data {options.data}: {error}") from None
    chosen = list(classes)[: options.subjects]
    settings = {"model": str(options.model), "train_steps": options.train_steps, "steps": options.steps, "bias": options.bias}
    before = [row for row in (rows.read(options.out) if options.out.exists() else []) if row["settings"] == settings]
    todo = [subject for subject in chosen if subject not in {row["subject"] for row in before}]
    pipe = load_pipeline(options.model, device=options.device) if todo else None
    scorer = Scorer(options.clip, options.dino, pipe._execution_device) if todo else None
    for subject in todo:
        kind = "live" if classes[subject] in LIVING else "object"
        for row in measure(pipe, scorer, subject, classes[subject], prompts[kind], options):
            row |= {"suite": "fidelity, real", "settings": settings, **rows.provenance(str(pipe._execution_device))}
            rows.append(options.out, row)
            before.append(row)
    print(table(before))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="as `perfusion train --model`")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clip", help="folder or id of a CLIP model")
    parser.add_argument("--dino", help="folder or id of a DINO model")
    parser.add_argument("--clipseg", type=Path, help="folder of CLIPSeg, for masks of the subjects")
    parser.add_argument("--subjects", type=int, help="so many of the list alone")
    parser.add_argument("--bias", type=float, action="append", help="may be repeated; by default the concept's own")
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fidelity_real.jsonl")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fidelity" / "real")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
