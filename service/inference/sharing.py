"""Works that may be done in any order and at once, shared with whatever threads of a pool are idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

Work = Callable[[], object]


def share(works: Sequence[Work], pool: Executor | None) -> None:
    """Do all of them: on this thread in their order, but for those that a thread of ``pool`` has begun by then.

    The pool begins with the last. So this thread may be one of the pool's own: it waits for nothing that has not begun.
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
