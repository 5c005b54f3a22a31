"""Runs of a session with inputs and outputs in a device's memory, by ONNX Runtime's IOBinding.

``InferenceSession.run`` copies every input to the device and every output back. With a binding an array that is kept is
copied once, and an output stays on the device until it is fetched. The device is a parameter: bound to "cpu" the same
code computes what ``run`` computes, bitwise, which the tests check. It never ran on "cuda" (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnxruntime as ort

Value: TypeAlias = np.ndarray | ort.OrtValue


class BoundSession:
    """A session with inputs and outputs in ``memory``; "cuda" is the first device. Several threads may call it.

    >>> bound = BoundSession(session, "cuda")  # doctest: +SKIP
    >>> noise = bound.keep(noise)  # doctest: +SKIP
    >>> loc, scale = bound.run(["loc", "scale"], {"x": x, "noise": noise})  # doctest: +SKIP
    """

    def __init__(self, session: ort.InferenceSession, memory: str) -> None:
        self._session, self._memory = session, memory

    def keep(self, value: np.ndarray) -> ort.OrtValue:
        """Put an array into the device's memory, as an input for any number of runs.

        The array must not be written to afterwards, since on "cpu" it is not copied.
        """
        return ort.OrtValue.ortvalue_from_numpy(value, self._memory)

    def run(self, names: Sequence[str], feeds: Mapping[str, Value]) -> list[np.ndarray]:
        """Run the session and return the outputs of these names as new arrays on the host."""
        binding = self._session.io_binding()  # one a run: several threads may run the session at the same time
        for name, value in feeds.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, value)
        for name in names:
            binding.bind_output(name, self._memory)
        # Copies are only queued, on a stream that need not be the run's; on the CPU there is nothing to wait for.
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        outputs: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return outputs
