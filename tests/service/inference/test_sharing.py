"""Works that are shared with a pool are done once each, whoever does them, and nobody waits for what has not begun."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.inference.sharing import share


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_each_work_is_done_once(threads):
    done = []
    works = [lambda number=number: done.append(number) for number in range(20)]
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            share(works, pool)
            assert sorted(done) == [*range(20)]  # before the pool is awaited
    else:
        share(works, None)
        assert done == [*range(20)]


def test_an_idle_thread_takes_the_last_work_while_the_first_is_under_way():
    both, threads = threading.Barrier(2, timeout=60), {}

    def work(name):
        threads[name] = threading.current_thread()
        both.wait()  # for the other

    with ThreadPoolExecutor(1) as pool:
        share([lambda: work("first"), lambda: work("last")], pool)
    assert threads["first"] is threading.current_thread()
    assert threads["last"] is not threading.current_thread()


def test_threads_of_a_pool_may_share_with_it():
    """All of them at once: each does its own, since none is idle."""
    done = []
    with ThreadPoolExecutor(2) as pool:
        both = threading.Barrier(2, timeout=60)

        def outer(name):
            both.wait()
            share([lambda number=number: done.append((name, number)) for number in range(5)], pool)

        for future in [pool.submit(outer, name) for name in "ab"]:
            future.result(timeout=60)
    assert sorted(done) == [(name, number) for name in "ab" for number in range(5)]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_work_that_fails_is_heard(threads):
    pool = ThreadPoolExecutor(threads) if threads else None
    with pytest.raises(ZeroDivisionError):
        share([lambda: None, lambda: 1 / 0], pool)
    if pool is not None:
        pool.shutdown()
