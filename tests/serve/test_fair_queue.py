"""Turns, bounds, and places in line."""

import pytest

from perfusion.serve.fair_queue import FairQueue, Full

pytestmark = pytest.mark.serve


def drain(queue, busy=()):
    found = []
    while len(queue):
        found.append(queue.pop(dict(busy))[1])
    return found


def test_keys_take_turns_however_much_one_asks_for():
    queue = FairQueue(100)
    queue.push("many", [f"m{number}" for number in range(5)])
    queue.push("few", ["f0", "f1"])
    assert drain(queue) == ["m0", "f0", "m1", "f1", "m2", "m3", "m4"]


def test_who_has_less_drawn_goes_first():
    queue = FairQueue(100)
    queue.push("busy", ["b"])
    queue.push("idle", ["i"])
    assert drain(queue, {"busy": 3}.items()) == ["i", "b"]


def test_bounds_hold_for_all_and_for_each_and_refuse_whole_requests():
    queue = FairQueue(5, 3)
    queue.push("a", [1, 2])
    with pytest.raises(Full):
        queue.push("a", [3, 4])
    queue.push("b", [5, 6, 7])
    with pytest.raises(Full):
        queue.push("c", [8])
    assert len(queue) == 5


def test_what_is_returned_is_first_again_and_what_is_removed_is_gone():
    queue = FairQueue(2)
    queue.push("a", [1, 2])
    key, item = queue.pop({})
    queue.push("a", [3])
    queue.push_back(key, item)
    assert queue.remove("a", 2) and not queue.remove("a", 2) and not queue.remove("b", 1)
    assert drain(queue) == [1, 3]
    with pytest.raises(KeyError):
        queue.pop({})
