"""pytriton: Triton's HTTP server and dynamic batcher, a Python process a core behind it."""

import numpy as np
from encoder import PORT, WORKERS, Encoder
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def infer_function():
    encoder = Encoder()

    @batch
    def infer(x):
        loc, scale = encoder(x)
        return {"loc": loc, "scale": scale}

    return infer


if __name__ == "__main__":
    sizes = Encoder()
    config = TritonConfig(
        http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False, log_verbose=0,
        exit_timeout_secs=1,
    )  # fmt: skip
    with Triton(config=config) as triton:
        triton.bind(
            model_name="encoder",
            infer_func=[infer_function() for _ in range(WORKERS)],
            inputs=[Tensor(name="x", dtype=np.float32, shape=sizes.shape)],
            outputs=[Tensor(name=name, dtype=np.float32, shape=(sizes.latent_dim,)) for name in ("loc", "scale")],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()
