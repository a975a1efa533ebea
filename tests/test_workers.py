"""Pieces side by side: the same results in the same order, and nothing left behind."""

import threading
import time

import pytest
import torch

from fastppo.workers import Workers


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_in_order_by_several_threads():
    seen, meet = set(), threading.Barrier(2, timeout=30)

    def square(x):
        if x < 2:
            meet.wait()  # passes only where two pieces run at once
        time.sleep(0.01 * (x % 3))
        seen.add(threading.get_ident())
        return x * x

    assert list(Workers(2).map(square, range(9))) == [x * x for x in range(9)]
    assert len(seen) == 2 and threading.get_ident() not in seen


@pytest.mark.parametrize("most, items, threads, count", [(1, 5, 4, 1), (2, 1, 4, 1), (2, 0, 4, 1), (2, 5, 1, 1), (3, 5, 4, 3)])
def test_how_many(most, items, threads, count):
    torch.set_num_threads(threads)
    workers = Workers(most)
    assert workers.count(items) == count
    here = threading.get_ident()
    found = set(workers.map(lambda _: threading.get_ident(), range(items)))
    assert found <= {here} if count == 1 else here not in found


def test_each_has_its_share_of_the_threads_and_the_caller_gets_his_back():
    assert set(Workers(2).map(lambda _: torch.get_num_threads(), range(6))) == {2}
    assert torch.get_num_threads() == 4
    new = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [4], "threads that begin later have all of them"


@pytest.mark.parametrize("recording", [True, False])
def test_gradients_are_recorded_where_the_caller_records_them(recording):
    x = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(recording):
        assert [y.requires_grad for y in Workers(2).map(lambda k: x * k, range(4))] == [recording] * 4


def test_an_error_comes_in_its_turn_and_ends_the_rest():
    done, going = [], threading.active_count()

    def piece(i):
        if i == 3:
            raise KeyError("the third")
        done.append(i)
        return i

    results = Workers(2).map(piece, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="the third"):
        next(results)
    assert len(done) < 20 and threading.active_count() == going and torch.get_num_threads() == 4


def test_no_more_is_made_ahead_than_a_few():
    begun, going = [], threading.active_count()
    results = Workers(2).map(lambda i: begun.append(i), range(100))
    next(results)
    time.sleep(0.2)
    assert len(begun) <= 6
    results.close()
    assert len(begun) <= 6 and threading.active_count() == going


def test_a_caller_that_stops_early_waits_for_what_runs():
    ended, going = [], threading.active_count()

    def piece(i):
        time.sleep(0.05)
        ended.append(i)

    for _ in Workers(2).map(piece, range(50)):
        break
    assert threading.active_count() == going and 1 <= len(ended) <= 6
