"""How many threads the command line asks for."""

import os

import pytest

from perfusion.cli.threads import core_limit, set_threads


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "files, limit",
    [
        ({"cpu_dot_max": "150000 100000\n"}, 2),
        ({"cpu_dot_max": "20000 100000\n"}, 1),
        ({"cpu_dot_max": "max 100000\n"}, None),
        ({"cpu__cpu.cfs_quota_us": "400000\n", "cpu__cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu__cpu.cfs_quota_us": "-1\n", "cpu__cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu_dot_max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_limit_of_a_container_is_read(tmp_path, files, limit):
    write(tmp_path, **files)
    assert core_limit(tmp_path) == limit


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    plain, limited, chosen = {}, {}, {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    set_threads(plain, None)
    set_threads(limited, 2)
    set_threads(chosen, 2)
    assert plain == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert limited == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    assert chosen == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
