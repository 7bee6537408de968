"""How the command line asks OpenMP for threads, before torch is loaded; what the user has set stays."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["core_limit", "set_threads"]

CGROUPS = Path("/sys/fs/cgroup")


def core_limit(root: Path = CGROUPS) -> int | None:
    """Cores that a container may use at a time, by its cgroup (version 2, then 1); None without a limit or elsewhere."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return None if quota in ("max", "-1") else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return None


def set_threads(environment: MutableMapping[str, str], limit: int | None) -> None:
    """Threads that wait sleep instead of spinning, and there are no more of them than cores.

    Spinning threads take the cores from one another when other programs run: a training of toybox then took 13 times as long. OpenMP
    counts the machine's cores, not what a container is allowed.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if limit is not None and limit < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(limit))
