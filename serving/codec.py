"""Between the wire and lists of JSON objects: V1 bodies and Open Inference Protocol tensors.

The Open Inference Protocol carries one JSON string per instance: tensor `instances` (BYTES,
shape [B]) in, tensor `predictions` (BYTES, shape [B]) out.
"""

import struct
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import orjson

from model.errors import InputError
from serving.kserve_api import InferInput, InferOutput, InferRequest, InferResponse
from serving.reasons import quoted

INPUT = "instances"
OUTPUT = "predictions"
V1_FIELDS = {"instances"}
V2_FIELDS = {"id", "parameters", "inputs", "outputs"}


def parse_json(body: bytes) -> Any:
    """Parse a UTF-8 JSON body.

    Raises:
        InputError: not JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not valid JSON: {error}") from None


def read_instances(payload: Any) -> list[Any]:
    """The instances of a V1 body (dict) or an InferRequest, parsed but not validated.

    Raises:
        InputError: the envelope is wrong.
    """
    if isinstance(payload, InferRequest):
        return _instances_of_tensor(payload)
    if not isinstance(payload, dict):
        raise InputError('the body must be a JSON object {"instances": [...]}')
    if unknown := payload.keys() - V1_FIELDS:
        raise InputError(f"{quoted(min(unknown))}: no such field (known: instances)")
    instances = payload.get("instances")
    if not isinstance(instances, list):
        raise InputError("instances: is required and must be a list of JSON objects")
    return instances


def write_predictions(payload: Any, predictions: Sequence[Any], version: str | None) -> Any:
    """The answer in the protocol `payload` came in."""
    if not isinstance(payload, InferRequest):
        return {"predictions": list(predictions)}
    data = [orjson.dumps(p) for p in predictions]
    # Over gRPC tensors hold bytes, over REST text.
    values: list[Any] = data if payload.from_grpc else [d.decode() for d in data]
    return InferResponse(
        response_id=payload.id or str(uuid4()),
        model_name=payload.model_name,
        model_version=version,
        infer_outputs=[InferOutput(OUTPUT, [len(values)], "BYTES", values)],
    )


def infer_request(body: Any, model_name: str) -> Any:
    """An InferRequest from an Open Inference Protocol REST body.

    Raises:
        InputError: names what is wrong with the envelope.
    """
    if not isinstance(body, dict):
        raise InputError('the body must be a JSON object {"inputs": [...]}')
    if unknown := body.keys() - V2_FIELDS:
        known = ", ".join(sorted(V2_FIELDS))
        raise InputError(f"{quoted(min(unknown))}: no such field (known: {known})")
    request_id = body.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InputError("id: must be text")
    inputs = body.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(i, dict) for i in inputs):
        raise InputError("inputs: is required and must be a list of tensors")
    tensors = []
    for i, tensor in enumerate(inputs):
        name, shape = tensor.get("name"), tensor.get("shape")
        datatype, data = tensor.get("datatype"), tensor.get("data")
        if not isinstance(name, str) or not isinstance(datatype, str):
            raise InputError(f"inputs[{i}]: needs a name and a datatype, both text")
        if not isinstance(shape, list) or not all(type(s) is int for s in shape):
            raise InputError(f"inputs[{i}].shape: must be a list of integers")
        if not isinstance(data, list):
            raise InputError(f"inputs[{i}].data: must be a list (binary tensors: use gRPC)")
        tensors.append(InferInput(name=name, shape=shape, datatype=datatype, data=data))
    return InferRequest(model_name=model_name, infer_inputs=tensors, request_id=request_id)


def _instances_of_tensor(request: Any) -> list[Any]:
    names = [tensor.name for tensor in request.inputs]
    if names != [INPUT]:
        raise InputError(f"inputs: expected one tensor named {INPUT!r} (got {quoted(names)})")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES":
        raise InputError(f"inputs.{INPUT}: datatype must be BYTES (got {quoted(tensor.datatype)})")
    if len(tensor.shape) != 1:
        raise InputError(f"inputs.{INPUT}: shape must be [number of instances]")
    if tensor.data:
        values = tensor.data
    else:
        try:
            values = tensor.as_numpy().tolist()  # raw contents, length-prefixed
        except (struct.error, ValueError, TypeError) as error:
            raise InputError(f"inputs.{INPUT}: contents do not fit the shape: {error}") from None
    if list(tensor.shape) != [len(values)]:
        raise InputError(
            f"inputs.{INPUT}: shape {list(tensor.shape)} does not fit {len(values)} values"
        )
    instances = []
    for i, value in enumerate(values):
        try:
            instances.append(orjson.loads(value))
        except (orjson.JSONDecodeError, TypeError):
            raise InputError(f"instances[{i}]: must be one JSON object as text") from None
    return instances
