"""Works that may be done in any order and at the same time, shared with the idle threads of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

Work = Callable[[], object]


def share(works: Sequence[Work], pool: Executor | None) -> None:
    """Do all works: on this thread in their order, but for those that a thread of ``pool`` has begun by then.

    The pool begins with the last work. This thread may be one of the pool's own, since it does not wait for works that
    have not begun. Raises what a work raises.
    """
    if pool is None:
        for work in works:
            work()
        return
    offered = [(work, pool.submit(work)) for work in reversed(works)]
    for work, future in reversed(offered):
        if future.cancel():
            work()
        else:
            future.result()
