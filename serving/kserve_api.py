"""The parts of KServe that are used, imported so that importing them has no side effects.

KServe parses `sys.argv` when imported: a program with its own `--workers` or `--protocol` would
be hijacked or killed. It also creates an application object that warns about ORJSONResponse.
"""

import sys
import warnings

_argv = sys.argv
sys.argv = _argv[:1]
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from grpc_interceptor import AsyncServerInterceptor
        from kserve import (
            InferInput,
            InferOutput,
            InferRequest,
            InferResponse,
            Model,
            ModelRepository,
        )
        from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady
        from kserve.model_server import ModelServer
        from kserve.protocol.dataplane import DataPlane
        from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
        from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc
        from kserve.protocol.grpc.servicer import InferenceServicer
        from kserve.protocol.rest.server import metrics_handler
        from kserve.protocol.rest.v1_endpoints import V1Endpoints
        from kserve.protocol.rest.v2_endpoints import V2Endpoints
finally:
    sys.argv = _argv

__all__ = [
    "AsyncServerInterceptor",
    "DataPlane",
    "InferInput",
    "InferOutput",
    "InferRequest",
    "InferResponse",
    "InferenceServicer",
    "InvalidInput",
    "Model",
    "ModelNotFound",
    "ModelNotReady",
    "ModelRepository",
    "ModelServer",
    "ServerNotReady",
    "V1Endpoints",
    "V2Endpoints",
    "metrics_handler",
    "pb",
    "pb_grpc",
]
