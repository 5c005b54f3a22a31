"""MLServer: a custom runtime, with adaptive batching and a pool of parallel workers. mlserver start mlserver_model"""

from encoder import Encoder
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class EncoderRuntime(MLModel):
    async def load(self) -> bool:
        self.encoder = Encoder()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        loc, scale = self.encoder(NumpyCodec.decode_input(payload.inputs[0]))
        outputs = [NumpyCodec.encode_output("loc", loc), NumpyCodec.encode_output("scale", scale)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
