"""LitServe: a LitAPI with batching, a worker a core. With batch_timeout 0 idle workers spin; 1 ms did best here."""

import litserve as ls
import numpy as np
from encoder import PORT, WORKERS, Encoder


class EncoderAPI(ls.LitAPI):
    def setup(self, device):
        self.encoder = Encoder()

    def decode_request(self, request):
        return np.array(request["images"], dtype=np.float32)

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        """A list of requests' images: one run, and each its rows."""
        loc, scale = self.encoder(np.concatenate(inputs))
        ends = np.cumsum([len(x) for x in inputs])[:-1]
        return list(zip(np.split(loc, ends), np.split(scale, ends), strict=True))

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        loc, scale = output
        return {"loc": loc.tolist(), "scale": scale.tolist()}


if __name__ == "__main__":
    api = EncoderAPI(max_batch_size=64, batch_timeout=0.001, api_path="/encode")
    server = ls.LitServer(api, accelerator="cpu", devices=1, workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
