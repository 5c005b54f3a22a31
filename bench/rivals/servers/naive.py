"""The server that one writes first: FastAPI, JSON in and out. uvicorn naive:app --workers 2"""

import os

import numpy as np
import onnxruntime as ort
from fastapi import FastAPI
from pydantic import BaseModel

options = ort.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("BENCH_THREADS", "0"))  # 0: onnxruntime's default, one a core
session = ort.InferenceSession(os.environ["BENCH_ENCODER"], options)
noise_dim = session.get_inputs()[1].shape[2]
app = FastAPI()


class Images(BaseModel):
    images: list[list[list[list[float]]]]


@app.post("/encode")
def encode(body: Images):
    x = np.array(body.images, dtype=np.float32)
    loc, scale = session.run(["loc", "scale"], {"x": x, "noise": np.zeros((len(x), 1, noise_dim), np.float32)})
    return {"loc": loc.tolist(), "scale": scale.tolist()}
