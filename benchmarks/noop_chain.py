"""The yardstick: KServe's own server with a transformer and a predictor that do nothing.

    python -m benchmarks.noop_chain predictor HTTP_PORT GRPC_PORT
    python -m benchmarks.noop_chain transformer HTTP_PORT GRPC_PORT PREDICTOR_GRPC_PORT

The same bodies and messages as the service's, a tensor of the size of a history in between, 25
items back. KServe as it comes, with its lines per request switched off, bound to this machine
alone.
"""

import json
import logging
import sys

import numpy as np
from kserve.context import set_predictor_config
from kserve.predictor_config import PredictorConfig
from kserve.protocol.grpc import server as grpc_server
from kserve.protocol.rest import server as rest_server

from serving.kserve_api import InferInput, InferOutput, InferRequest, InferResponse, Model
from serving.kserve_api import ModelServer as Server

HISTORY, ITEMS = 100, 25
GRPC = "grpc"  # the id of a request that is to be answered in this protocol


class Predictor(Model):
    async def predict(self, payload, headers=None, response_headers=None):
        payload.inputs[0].as_numpy()
        outputs = []
        for name, values, datatype in (
            ("items", np.arange(ITEMS, dtype=np.int64)[None], "INT64"),
            ("scores", np.zeros((1, ITEMS), np.float32), "FP32"),
        ):
            output = InferOutput(name, list(values.shape), datatype)
            output.set_data_from_numpy(values, binary_data=False)
            outputs.append(output)
        return InferResponse(payload.id or "1", self.name, outputs)


class Transformer(Model):
    async def preprocess(self, payload, headers=None):
        from_grpc = isinstance(payload, InferRequest)
        instance = payload.inputs[0].data[0] if from_grpc else payload["instances"][0]
        if from_grpc:
            instance = json.loads(instance)
        assert instance["user_id"]
        history = InferInput("history", [1, HISTORY], "INT64")
        history.set_data_from_numpy(np.zeros((1, HISTORY), np.int64), binary_data=False)
        return InferRequest(self.name, [history], GRPC if from_grpc else "1")

    async def postprocess(self, result, headers=None, response_headers=None):
        items, scores = (output.as_numpy()[0].tolist() for output in result.outputs)
        prediction = {
            "items": [{"item_id": str(i), "score": s} for i, s in zip(items, scores, strict=True)]
        }
        if result.id != GRPC:
            return {"predictions": [prediction]}
        text = json.dumps(prediction).encode()
        return InferResponse("1", self.name, [InferOutput("predictions", [1], "BYTES", [text])])


def only_this_machine():
    """KServe listens everywhere, and has no setting for it."""
    configure = rest_server.uvicorn.Config
    make = grpc_server.aio.server

    def bound(*arguments, **options):
        server = make(*arguments, **options)
        add = server.add_insecure_port
        server.add_insecure_port = lambda at: add(at.replace("[::]", "127.0.0.1"))
        return server

    rest_server.uvicorn.Config = lambda app, **o: configure(app, **(o | {"host": "127.0.0.1"}))
    grpc_server.aio.server = bound


def main():
    role, http_port, grpc_port, *predictor = sys.argv[1:]
    only_this_machine()
    model = Predictor("noop") if role == "predictor" else Transformer("noop")
    model.ready = True
    server = Server(http_port=int(http_port), grpc_port=int(grpc_port), workers=1)
    if predictor:
        set_predictor_config(PredictorConfig(f"127.0.0.1:{predictor[0]}", "grpc-v2"))
    for name in ("kserve", "kserve.trace", "uvicorn.access", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    server.start([model])


if __name__ == "__main__":
    main()
