"""Learning a concept from a handful of pictures: `perfusion.train` and its parts.

Source of the recipe: arXiv 2305.01644, section 4 and appendix A. DESIGN.md, "Training", says what was open and what was chosen.
"""

from perfusion.training.train import train
from perfusion.training_config import TrainingConfig

__all__ = ["TrainingConfig", "train"]
