"""How much is drawn and trained: `full` is what figures are quoted from, `small` what a laptop does in its lunch break."""

from __future__ import annotations

import dataclasses

from perfusion.toybox.score import GUIDANCE

__all__ = ["SCALES", "Scale"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """subjects, prompts, seeds: of every main row, and of peers where `widely`; subset_*: of ablations, and of peers where not.
    steps, batch: of a training. ladder: settings of each sweep, at most. sampling_steps: of DDIM. guidance: what toybox is drawn with.
    drawn_in: the arithmetic that the model draws in, for every method (autocast); trainings are in float32."""

    name: str
    subjects: int = 12
    prompts: int = 23
    seeds: int = 8
    subset_subjects: int = 4
    subset_prompts: int = 8
    subset_seeds: int = 4
    pairs: int = 6
    pair_prompts: int = 8
    steps: int = 200
    batch: int = 8
    sampling_steps: int = 10
    guidance: float = GUIDANCE
    drawn_in: str = "bfloat16"
    ladder: int = 9
    widely: bool = False

    def identity(self) -> dict[str, int]:
        """What rows of one scale share: a row of other numbers is another row."""
        not_theirs = ("name", "subjects", "pairs", "ladder", "widely")
        found = {key: value for key, value in dataclasses.asdict(self).items() if key not in not_theirs}
        if self.drawn_in == "float32":
            del found["drawn_in"]
        return found


SCALES = {
    "full": Scale("full", widely=True),
    "product": Scale("product", steps=400, batch=16),  # trainings as long as those of `perfusion train`
    "medium": Scale(
        "medium", subjects=6, prompts=12, seeds=3, subset_subjects=2, subset_prompts=8, subset_seeds=3, pairs=3, pair_prompts=4, ladder=7,
    ),
    "small": Scale(
        "small", subjects=2, prompts=7, seeds=2, subset_subjects=1, subset_prompts=7, subset_seeds=2, pairs=1, pair_prompts=4,
        steps=120, batch=6, sampling_steps=10, drawn_in="float32", ladder=4,
    ),
    "smoke": Scale(
        "smoke", subjects=2, prompts=3, seeds=1, subset_subjects=1, subset_prompts=2, subset_seeds=1, pairs=1, pair_prompts=1,
        steps=2, batch=2, sampling_steps=2, drawn_in="float32", ladder=2,
    ),
}  # fmt: skip
