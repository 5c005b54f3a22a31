"""A lock for parsing Python literals, such as the header of every npy array, on one thread at a time.

CPython 3.11 counts the depth of all threads' syntax trees together, so that ``ast.literal_eval`` on two threads may
raise SystemError for a sound literal.
"""

from __future__ import annotations

import threading

PARSING = threading.Lock()
