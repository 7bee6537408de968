"""What several commands check before they begin."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["check_device", "refuse_existing"]


def check_device(device: str | None) -> None:
    """ValueError unless tensors can be computed with on the device; None is for the caller to choose."""
    import torch

    try:
        torch.empty(1, device=device).sum().item()  # "meta" has tensors, and no numbers in them
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def refuse_existing(files: Iterable[Path], overwrite: bool) -> None:
    """FileExistsError if one of the files to write is there, unless the user said --overwrite."""
    present = [str(file) for file in dict.fromkeys(files) if file.exists()]
    if present and not overwrite:
        more = f", and {len(present) - 1} more" if len(present) > 1 else ""
        raise FileExistsError(f"{present[0]} is there already{more}. Choose another --output, or say --overwrite.")
