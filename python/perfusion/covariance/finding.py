"""The covariance of a pipeline: from the model's folder, from the cache, or computed and cached."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path

import perfusion_kernels
from perfusion.base import fingerprints_match, text_encoder_fingerprint
from perfusion.captions import EVERYDAY_COUNT, everyday_captions, everyday_source, read_captions
from perfusion.covariance.computing import compute_covariance
from perfusion.covariance.record import FILE_NAME, MAX_CONDITION, Covariance, CovarianceError

__all__ = ["cache_folder", "get_covariance"]


def cache_folder() -> Path:
    """Where covariances are kept; not created here."""
    return perfusion_kernels.cache_folder() / "covariance"


def get_covariance(
    pipe,
    captions: str | Path | Iterable[str] | None = None,
    *,
    count: int | None = None,
    model_folder: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
    max_condition: float = MAX_CONDITION,
) -> Covariance:
    """The covariance of `pipe`'s text encoder: from the model's folder, from the cache, or computed now and cached.

    captions: None for the built-in corpus, a file for `read_captions`, or captions. count: at most this many of them; by
    default 20,000 of the built-in corpus and all of a file. model_folder: by default the folder that `pipe` was loaded from;
    its `covariance.safetensors` is taken where neither captions nor count say otherwise.
    A stored covariance is taken if it belongs to this text encoder and was shrunk as `max_condition` asks; one that is
    damaged or belongs to another encoder is reported with a UserWarning and computed anew. Other errors: `compute_covariance`.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    encoder = text_encoder_fingerprint(pipe)
    if captions is None and count is None:
        folder = model_folder or pipe.config.get("_name_or_path")
        if folder and (found := _stored(Path(folder) / FILE_NAME, encoder, max_condition)):
            return found
    captions, source = _corpus(captions, count)
    # Equal fingerprints, not only matching ones: a cached C is cheap to replace, so a fine-tuned encoder gets its own.
    path = cache_folder() / f"{hashlib.sha256(encoder.encode()).hexdigest()[:16]}-{source}-{max_condition:g}.safetensors"
    if found := _stored(path, encoder, max_condition):
        return found
    covariance = compute_covariance(
        pipe, captions, batch_size=batch_size, progress=progress, max_condition=max_condition, source=source
    )
    try:
        return covariance.save(path)
    except OSError as error:  # a read-only home must not cost the minutes just spent
        warnings.warn(f"the covariance could not be cached and will be computed again next time: {error}", stacklevel=2)
        return covariance


def _corpus(captions: str | Path | Iterable[str] | None, count: int | None) -> tuple[Iterable[str], str]:
    """The captions and the name under which their covariance is stored."""
    if captions is None:
        count = count or EVERYDAY_COUNT
        return list(everyday_captions(count)), everyday_source(count)
    if not isinstance(captions, (str, Path)):
        captions = list(itertools.islice(captions, count))
        digest = hashlib.sha256("".join(caption + "\n" for caption in captions).encode())
        return captions, f"captions-{digest.hexdigest()[:16]}"
    lines = itertools.islice(read_captions(captions), count)
    digest = hashlib.sha256()
    with open(captions, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return lines, f"file-{digest.hexdigest()[:16]}" + (f"-first{count}" if count else "")


def _stored(path: Path, encoder: str, max_condition: float) -> Covariance | None:
    """The covariance in `path` if it serves; None, with a warning where the file promised more, if it does not."""
    if not path.is_file():
        return None
    try:
        found = Covariance.load(path)
    except (CovarianceError, OSError) as error:
        warnings.warn(f"computing the covariance anew: {error}", stacklevel=3)
        return None
    if not fingerprints_match(found.text_encoder, encoder):
        warnings.warn(
            f"computing the covariance anew: {path} is of text encoder {found.text_encoder}, this is {encoder}", stacklevel=3
        )
        return None
    # An unshrunk C is the same under every limit that it meets.
    meets = found.max_condition == max_condition or (not found.shrinkage and found.condition <= max_condition)
    if not meets:
        warnings.warn(
            f"computing the covariance anew: {path} was limited to condition {found.max_condition:g}, not {max_condition:g}",
            stacklevel=3,
        )
    return found if meets else None
