"""C = E[e eᵀ], the second moment of a text encoder's outputs: the metric in which Perfusion compares encodings.

    from perfusion.covariance import get_covariance
    covariance = get_covariance(pipe)                          # cached, shipped beside the model, or computed now
    metric_targets = covariance.metric_targets(targets)        # [S, D] -> [S, D], targets @ C⁻¹

Source: arXiv 2305.01644, section 3 (uncentred second moment over a caption corpus; only its shape matters, not its scale).
Which tokens of a caption count is open there. Here the real ones do: the start, the words, the first end, not the padding,
which says nothing about language and would outnumber the words five to one. `docs/covariance.md` has the measurements.

A covariance belongs to one text encoder. It is found again by that encoder's fingerprint: in a file `covariance.safetensors`
in the model's own folder, where fingerprints must match, or in the cache, where they must be equal. The cache is
`covariance/` in `$PERFUSION_CACHE`, else in the system's cache folder of this user.

    record.py     C and where it comes from, its file
    computing.py  C of a caption corpus
    finding.py    the model's own, a cached, or a new one
"""

from perfusion.covariance.computing import compute_covariance, real_encodings
from perfusion.covariance.finding import cache_folder, get_covariance
from perfusion.covariance.record import FILE_NAME, MAX_CONDITION, Covariance, CovarianceError

__all__ = [
    "FILE_NAME",
    "MAX_CONDITION",
    "Covariance",
    "CovarianceError",
    "cache_folder",
    "compute_covariance",
    "get_covariance",
    "real_encodings",
]
