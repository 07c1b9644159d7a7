"""Requests that nobody should send, for the servers to refuse without falling over.

Made from the schemas, so that many come close to being right. `tests` use a few, and
`benchmarks.fuzz_serving` as many as time allows.
"""

import json

import grpc
from hypothesis import strategies as st

from serving.kserve_api import pb

BIG = st.sampled_from([10**9, 2**63, -(2**63), 10**400, 1e308, -1e308, 1.7e12, 253_402_300_800])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | BIG | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def nested(width, depth, text):
    """Objects in objects: width ** depth texts."""
    return text if not depth else {f"k{i}": nested(width, depth - 1, text) for i in range(width)}


# Large enough to fill an error text that quotes what was sent, and gRPC's metadata with it.
LARGE = st.builds(
    lambda width, depth, text, times: [nested(width, depth, text)] * times,
    st.integers(1, 6), st.integers(0, 4), st.sampled_from(["x" * 30, "🎬" * 10]), st.integers(1, 3),
) | st.builds(nested, st.integers(1, 6), st.integers(3, 4), st.just("é" * 30))  # fmt: skip
FIELDS = [
    *("user_id", "user", "history", "timestamp", "context", "task", "items", "num_results"),
    *("exclude_seen", "filter", "trend_weight", "exploration_weight", "surprise"),
    *("top_n", "score_items", "seed", "model_version"),
]


def instances(items):
    """Instances of both processes, more or less; `items`: ids that exist."""
    some = st.sampled_from(items)
    events = st.lists(
        st.fixed_dictionaries(
            {"item_id": some | JSON, "timestamp": st.integers(0, 999) | JSON},
            optional={"event_type": st.text(max_size=3) | JSON, "value": st.floats() | JSON},
        ),
        max_size=5,
    )
    values = {
        "user_id": st.sampled_from(["u1", "x"]),
        "history": events,
        "items": st.lists(some | st.just("nope")),
        "score_items": st.lists(some | st.just("nope")),
        "task": st.sampled_from(["recommend", "rank", "rate", "score", "trend", "guess"]),
        "context": st.dictionaries(st.sampled_from(["device", "volume"]), JSON),
        "num_results": st.integers(-1, 400),
        "top_n": st.integers(-1, 400),
        "timestamp": st.floats(),
        "trend_weight": st.floats(-1, 101),
        "exploration_weight": st.floats(-1, 101),
        "filter": st.dictionaries(st.sampled_from(["include", "exclude", "where"]), JSON),
    }
    wild = st.sets(st.sampled_from(FIELDS), max_size=5).flatmap(
        lambda names: st.fixed_dictionaries({n: values.get(n, JSON) | JSON | LARGE for n in names})
    )
    return wild | JSON


def _torn(body):
    """The body as it is, cut off, or with a byte changed."""
    at = st.integers(0, max(len(body) - 1, 0))
    return st.one_of(
        st.just(body),
        at.map(lambda i: body[:i]),
        st.tuples(at, st.integers(0, 255)).map(
            lambda change: body[: change[0]] + bytes([change[1]]) + body[change[0] + 1 :]
        ),
    )


def _text(value):
    return json.dumps(value).encode(errors="surrogatepass")


def v1_bodies(items):
    whole = st.fixed_dictionaries({"instances": st.lists(instances(items), max_size=3)}) | JSON
    return whole.map(_text).flatmap(_torn) | st.binary(max_size=40)


def v2_bodies(items):
    data = st.lists(instances(items).map(lambda i: json.dumps(i)) | JSON, max_size=3)
    tensor = st.fixed_dictionaries(
        {
            "name": st.just("instances") | JSON,
            "datatype": st.sampled_from(["BYTES", "INT64", "FP32"]) | JSON,
            "shape": st.lists(st.integers(-1, 3), max_size=2) | JSON,
            "data": data | JSON,
        }
    )
    whole = st.fixed_dictionaries(
        {"inputs": st.lists(tensor | JSON, max_size=2) | JSON},
        optional={"id": JSON, "parameters": JSON, "outputs": JSON, "more": JSON},
    )
    return (whole | JSON).map(_text).flatmap(_torn)


def grpc_messages(items, model_name):
    """ModelInferRequest in wire format, whole and torn."""
    contents = st.lists(instances(items).map(_text) | st.binary(max_size=20), max_size=3)

    def message(values, shape, datatype, name, model, raw, as_raw):
        request = pb.ModelInferRequest(
            model_name=model,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name=name,
                    datatype=datatype,
                    shape=shape or [len(values)],
                    contents=pb.InferTensorContents(bytes_contents=[] if as_raw else values),
                )
            ],
            raw_input_contents=raw if as_raw else [],
        )
        return request.SerializeToString()

    whole = st.builds(
        message,
        values=contents,
        shape=st.lists(st.integers(-(2**40), 2**40), max_size=2),
        datatype=st.sampled_from(["BYTES", "BYTES", "INT64", "", "x"]),
        name=st.sampled_from(["instances", "instances", "", "y"]),
        model=st.sampled_from([model_name, model_name, "other"]),
        raw=st.lists(st.binary(max_size=20), max_size=2),
        as_raw=st.booleans(),
    )
    return whole.flatmap(_torn) | st.binary(max_size=40)


def refused_or_answered(response):
    """Check an HTTP answer: never 5xx, and a reason when it is not 200."""
    assert response.status_code in (200, 400, 404, 413, 415), response.text
    answer = response.json()
    if response.status_code != 200:
        short = isinstance(answer["error"], str) and len(answer["error"].encode()) <= 2000
        assert short and answer["error"], answer


# Not RESOURCE_EXHAUSTED: no message here is above the limit, so that it would say that a reason is
# too long for gRPC's metadata. Nor UNAVAILABLE, which is what overload is called: one at a time is
# no load.
FINE = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


def ask_grpc(channel, message):
    """Send raw bytes as a ModelInfer message; fails on any status but a refusal."""
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    try:
        call(message, timeout=30)
    except grpc.RpcError as error:
        assert error.code() in FINE, f"{error.code()}: {error.details()}"
        assert error.details() and len(error.details().encode()) <= 2000
