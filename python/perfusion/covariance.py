"""C = E[e eᵀ], the second moment of a text encoder's outputs: the metric in which Perfusion compares encodings.

    from perfusion.covariance import get_covariance
    covariance = get_covariance(pipe)                          # cached, shipped beside the model, or computed now
    metric_targets = covariance.metric_targets(targets)        # [S, D] -> [S, D], targets @ C⁻¹

Source: arXiv 2305.01644, section 3 (uncentred second moment over a caption corpus; only its shape matters, not its scale).
Which tokens of a caption count is open there. Here the real ones do: the start, the words, the first end, not the padding,
which says nothing about language and would outnumber the words five to one. `docs/covariance.md` has the measurements.

A covariance belongs to one text encoder. It is found again by that encoder's fingerprint: in a file `covariance.safetensors`
in the model's own folder, where fingerprints must match, or in the cache, where they must be equal. The cache is
`$PERFUSION_HOME/covariance`, else `$XDG_CACHE_HOME/perfusion/covariance`, else `~/.cache/perfusion/covariance`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm.auto import tqdm

from perfusion.base import fingerprints_match, text_encoder_fingerprint, text_encoders
from perfusion.captions import EVERYDAY_COUNT, everyday_captions, everyday_source, read_captions
from perfusion.files import whole
from perfusion_kernels.metric import MetricSolver, condition_number, shrink

__all__ = [
    "MAX_CONDITION",
    "Covariance",
    "CovarianceError",
    "cache_folder",
    "compute_covariance",
    "get_covariance",
    "real_encodings",
]

# Above this, rounding an encoding to half precision moves gates by more than a percent: docs/covariance.md, under
# "How large a condition number may be".
MAX_CONDITION = 1e6
FORMAT = "covariance-1"
FILE_NAME = "covariance.safetensors"
MAX_WIDTH = 16384  # a file that claims more is not believed: its matrix alone would take 2 GiB


class CovarianceError(ValueError):
    """A covariance file that cannot be trusted, or a text encoder whose covariance cannot be computed."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """C and where it comes from.

    matrix: [D, D] float64 on the CPU, symmetric, positive definite, shrinkage already applied.
    captions, tokens: how many were counted. source: the corpus, such as "everyday-20000-seed0" or "file-<sha256>".
    text_encoder: fingerprint of the encoder(s), from perfusion.base.
    condition_before, condition: condition number (largest over smallest eigenvalue) before and after shrinkage.
    shrinkage: w in (1 − w) C + w mean(diag C) I; 0 unless condition_before exceeded max_condition.
    path: the file this was loaded from or saved to, if any.
    """

    matrix: Tensor
    captions: int
    tokens: int
    source: str
    text_encoder: str
    condition_before: float
    condition: float
    shrinkage: float
    max_condition: float
    path: Path | None = field(default=None)

    @property
    def width(self) -> int:
        """D, the width of an encoding."""
        return self.matrix.shape[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits, from the sha256 of the matrix as float32 bytes: names this C in concept files."""
        return hashlib.sha256(self.matrix.to(torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]

    @functools.cached_property
    def _solver(self) -> MetricSolver:
        return MetricSolver(self.matrix)

    def metric_targets(self, targets: Tensor) -> Tensor:
        """targets @ C⁻¹ for targets [S, D] or [D], on their device, in their dtype but at least float32; float64 inside.

        Raises ValueError for another width than D.
        """
        return self._solver(targets.cpu()).to(targets.device)

    def save(self, path: str | Path) -> Covariance:
        """Write one safetensors file, in full or not at all. Returns this covariance with `path` set."""
        path = Path(path)
        metadata = {name: str(getattr(self, name)) for name in _METADATA}
        metadata |= {"format": FORMAT, "fingerprint": self.fingerprint}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = to_bytes({"covariance": self.matrix.contiguous()}, {f"perfusion.{k}": v for k, v in metadata.items()})
        with whole(path) as draft:
            draft.write_bytes(data)  # safetensors' own errors name the draft, in words
        return replace(self, path=path)

    @staticmethod
    def load(path: str | Path) -> Covariance:
        """Read a file that `save` wrote and check all of it: format, shape, symmetry, finiteness, definiteness, fingerprint.

        Raises FileNotFoundError, or CovarianceError naming the file and what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such covariance file: {path}")
        try:
            with safe_open(path, "pt") as file:
                metadata = {k.removeprefix("perfusion."): v for k, v in (file.metadata() or {}).items()}
                _require(metadata.get("format") == FORMAT, path, f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                _require(list(file.keys()) == ["covariance"], path, f"it holds {list(file.keys())}, not ['covariance']")
                shape = file.get_slice("covariance").get_shape()
                square = len(shape) == 2 and shape[0] == shape[1] and 0 < shape[0] <= MAX_WIDTH
                _require(square, path, f"its shape is {shape}, not [D, D] with D ≤ {MAX_WIDTH}")
                matrix = file.get_tensor("covariance")
        except SafetensorError as error:
            raise CovarianceError(f"{path} is damaged: {error}") from error
        try:
            known = {name: parse(metadata[name]) for name, parse in _METADATA.items()}
        except (KeyError, ValueError) as error:
            raise CovarianceError(f"{path} is not a usable covariance: bad metadata: {error}") from error
        covariance = Covariance(matrix=matrix, path=path, **known)
        _require(matrix.dtype == torch.float64, path, f"its dtype is {matrix.dtype}, not torch.float64")
        try:
            covariance._solver
        except ValueError as error:
            raise CovarianceError(f"{path} is not a usable covariance: {error}") from error
        stated = metadata.get("fingerprint")
        _require(stated == covariance.fingerprint, path, f"its values have fingerprint {covariance.fingerprint}, not {stated}")
        return covariance


# What a file says beside the matrix: attribute -> how to read it back from text.
_METADATA = {
    "captions": int,
    "tokens": int,
    "source": str,
    "text_encoder": str,
    "condition_before": float,
    "condition": float,
    "shrinkage": float,
    "max_condition": float,
}


def _require(condition: bool, path: Path, complaint: str) -> None:
    if not condition:
        raise CovarianceError(f"{path} is not a usable covariance: {complaint}")


# ---- computing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compute_covariance(
    pipe,
    captions: Iterable[str],
    *,
    batch_size: int = 64,
    progress: bool = True,
    max_condition: float = MAX_CONDITION,
    source: str | None = None,
) -> Covariance:
    """C over the real tokens of `captions`, encoded by `pipe.encode_prompt` and therefore by what the UNet sees.

    pipe: a diffusers pipeline with CLIP text encoders (SD 1.x, 2.x, SDXL and their variants); where and in which precision
    it encodes is up to it, sums are float64 (on the CPU where the device has none). captions: read once, one batch in
    memory. A caption that the tokenizer truncates counts its 77 tokens. source: name of the corpus; by default a hash.
    Text encoders run in eval mode and get their own modes back. Nothing is written anywhere: an interrupt leaves no trace.
    A C whose condition number exceeds `max_condition` is shrunk, with a UserWarning that says by how much.
    Raises ValueError for bad arguments or no captions, CovarianceError for encodings that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if not 1 < max_condition <= 1e12:
        raise ValueError(f"max_condition must be above 1 and at most 1e12, not {max_condition:g}")
    if isinstance(captions, str):
        raise ValueError("captions must be several strings, not one; read_captions opens a file")
    encoders = [encoder for _, encoder in text_encoders(pipe)]
    fingerprint = text_encoder_fingerprint(pipe)  # first of all: it refuses offloaded weights
    digest, count, tokens, moment = hashlib.sha256(), 0, 0, None
    total = len(captions) if hasattr(captions, "__len__") else None
    bar = tqdm(total=total, unit="caption", desc="covariance", disable=not progress)
    with bar, _eval_mode(encoders):
        for batch in _batches(captions, batch_size):
            digest.update("".join(caption + "\n" for caption in batch).encode())
            rows = real_encodings(pipe, batch)
            if not rows.isfinite().all():
                raise CovarianceError(f"the text encoder's output is not finite for one of {batch[:3]}… ({rows.dtype})")
            rows = (rows.cpu() if rows.device.type == "mps" else rows).to(torch.float64)
            if moment is None:
                moment = rows.new_zeros(rows.shape[1], rows.shape[1])
            moment.addmm_(rows.T, rows)
            count, tokens = count + len(batch), tokens + len(rows)
            bar.update(len(batch))
    if moment is None:
        raise ValueError("there are no captions to count")
    matrix = moment.cpu() / tokens
    matrix = (matrix + matrix.T) / 2  # a matrix product is symmetric only up to rounding
    before = condition_number(matrix)
    shrunk, weight = shrink(matrix, max_condition)
    covariance = Covariance(
        matrix=shrunk,
        captions=count,
        tokens=tokens,
        source=source or f"captions-{digest.hexdigest()[:16]}",
        text_encoder=fingerprint,
        condition_before=before,
        condition=condition_number(shrunk) if weight else before,
        shrinkage=weight,
        max_condition=float(max_condition),
    )
    if weight:
        few = f"; {tokens} tokens are few for {len(matrix)} dimensions" if tokens < 10 * len(matrix) else ""
        warnings.warn(
            f"the covariance of {covariance.source} has condition number {before:.1e}, above {max_condition:.1e}{few}: "
            f"shrunk by {weight:.1e} towards its mean diagonal",
            stacklevel=3,  # no_grad's wrapper stands between
        )
    return covariance


def _batches(captions: Iterable[str], size: int) -> Iterator[list[str]]:
    captions = iter(captions)
    while batch := list(itertools.islice(captions, size)):
        yield batch


def real_encodings(pipe, captions: list[str]) -> Tensor:
    """[tokens, D]: the encodings of all real tokens of one batch of captions, on the pipeline's device, in its precision."""
    with _no_truncation_warnings(pipe):
        embeds = pipe.encode_prompt(
            prompt=captions, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
    real = _real_tokens([tokenizer for tokenizer, _ in text_encoders(pipe)], captions)
    if real.shape != embeds.shape[:2]:
        raise CovarianceError(f"{type(pipe).__name__} made {list(embeds.shape)} of {list(real.shape)} tokens")
    return embeds[real.to(embeds.device)]


def _real_tokens(tokenizers: list, captions: list[str]) -> Tensor:
    """[B, T] bool: the start token, the words and the first end token of each caption, not the padding."""
    masks = []
    for tokenizer in tokenizers:
        length = tokenizer.model_max_length
        ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        ends = (ids == tokenizer.eos_token_id).long()  # SD 1.x pads with the end token: only the first one is real
        masks.append(ends.cumsum(1) - ends == 0)
    if not all(torch.equal(mask, masks[0]) for mask in masks):
        raise CovarianceError("the pipeline's tokenizers split the same caption differently; one C cannot serve both")
    return masks[0]


@contextlib.contextmanager
def _eval_mode(encoders: Iterable[torch.nn.Module]):
    modes = [(module, module.training) for encoder in encoders for module in encoder.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _no_truncation_warnings(pipe):
    """diffusers warns once per truncated batch: thousands of lines for a corpus of long captions, where it is expected."""
    logger = logging.getLogger(type(pipe).encode_prompt.__module__)

    def keep(record: logging.LogRecord) -> bool:
        return "was truncated because CLIP" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


# ---- finding again --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where covariances are kept; not created here."""
    if home := os.environ.get("PERFUSION_HOME"):
        return Path(home).expanduser() / "covariance"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "perfusion" / "covariance"


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
