"""BentoML: a service with a worker a core and adaptive batching. bentoml serve bento:Encode"""

import bentoml
import numpy as np
from encoder import WORKERS, Encoder


@bentoml.service(workers=WORKERS, traffic={"timeout": 60})
class Encode:
    def __init__(self) -> None:
        self.encoder = Encoder()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=64, max_latency_ms=1000)
    def encode(self, images: np.ndarray) -> np.ndarray:
        """loc and scale side by side: what is batchable gives one array."""
        return np.concatenate(self.encoder(images), axis=1)
