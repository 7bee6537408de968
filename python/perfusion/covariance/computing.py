"""C over the real tokens of a caption corpus, encoded by a pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from perfusion.base import denoiser, project_text, text_encoder_fingerprint, text_encoders
from perfusion.base.parts import prepared_text
from perfusion.covariance.record import MAX_CONDITION, Covariance, CovarianceError
from perfusion_kernels.metric import condition_number, shrink

__all__ = ["compute_covariance", "real_encodings"]


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
    """C over the real tokens of `captions`, encoded by `pipe.encode_prompt` and therefore by what cross-attention reads.

    pipe: a diffusers pipeline with its text encoders and its denoiser, if that projects the text; where and in which precision
    it encodes is up to it, sums are float64 (on the CPU where the device has none). captions: read once, one batch in
    memory. A caption that the tokenizer truncates counts what is left. source: name of the corpus; by default a hash.
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
        result = pipe.encode_prompt(
            prompt=captions, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    embeds = result[0]
    if "max_sequence_length" in inspect.signature(pipe.encode_prompt).parameters:
        real = _attended(text_encoders(pipe)[0][0], prepared_text(pipe, captions), embeds.shape[1])
    else:
        real = _real_tokens([tokenizer for tokenizer, _ in text_encoders(pipe)], captions)
    if real.shape != embeds.shape[:2]:
        raise CovarianceError(f"{type(pipe).__name__} made {list(embeds.shape)} of {list(real.shape)} tokens")
    return project_text(denoiser(pipe), embeds[real.to(embeds.device)])


def _attended(tokenizer, captions: list[str], length: int) -> Tensor:
    """[B, T] bool: the tokens of each caption that are no padding, of encoders that read as many as they are told."""
    given = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return given.attention_mask.bool()


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
