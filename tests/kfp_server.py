"""A local server that speaks the v2beta1 API of Kubeflow Pipelines.

Bodies are held to the published schema (the generated models of kfp-server-api): a field that the
schema does not know, or a wrong type, is answered with 400, as by the real gateway.
"""

import json
import re
import threading
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api

BASE = "/apis/v2beta1"
INT64 = ("max_concurrency", "interval_second")


def checked(body, kind):
    """The body as a model; ValueError where the schema disagrees."""
    model = getattr(api, kind)
    names = {wire: name for name, wire in model.attribute_map.items()}
    if unknown := body.keys() - names.keys():
        raise ValueError(f"unknown field {sorted(unknown)[0]!r} in {kind}")
    for wire, value in body.items():
        expected = model.openapi_types[names[wire]]
        plain = {"str": str, "bool": bool, "int": int, "object": dict}.get(expected)
        if wire in INT64 and isinstance(value, int):
            value = str(value)  # the JSON form of protobuf takes 64-bit numbers both ways
        if plain is not None and not isinstance(value, plain):
            raise ValueError(f"{kind}.{wire}: expected {expected}, got {value!r}")
        if hasattr(api, expected) and isinstance(value, dict):
            checked(value, expected)
    return api.ApiClient()._ApiClient__deserialize(body, model)


class KfpServer:
    """Holds experiments, runs and recurring runs; a test moves the runs along."""

    def __init__(self):
        self.experiments, self.runs, self.recurring = {}, {}, {}
        self.fail_next = []  # (status, body) answered before anything else
        self.script = []  # how each further look finds a run: a function of the run
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                parts = urlsplit(self.path)
                query = {k: v[0] for k, v in parse_qs(parts.query).items()}
                if outer.fail_next:
                    status, answer = outer.fail_next.pop(0)
                else:
                    status, answer = outer.answer(self.command, parts.path, query, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method, path, query, body):
        routes = [
            ("GET", "/healthz", lambda: {"multi_user": False}),
            ("GET", "/experiments", lambda: self._list(self.experiments, "experiments", query)),
            ("POST", "/experiments", lambda: self._add(self.experiments, "experiment", body)),
            ("GET", "/runs", lambda: self._list(self.runs, "runs", query)),
            ("POST", "/runs", lambda: self._add(self.runs, "run", body)),
            ("GET", "/recurringruns", lambda: self._list(self.recurring, "recurringRuns", query)),
            ("POST", "/recurringruns", lambda: self._add(self.recurring, "recurring_run", body)),
        ]
        for verb, route, act in routes:
            if (method, path) == (verb, BASE + route):
                try:
                    return 200, act()
                except ValueError as error:
                    return 400, {"code": 3, "message": str(error), "details": []}
        if found := re.fullmatch(f"{BASE}/(runs|recurringruns)/([^/:]+)", path):
            kept = self.runs if found[1] == "runs" else self.recurring
            if found[2] not in kept:
                return 404, {"code": 5, "message": f"{found[1]} {found[2]} not found"}
            if method == "DELETE":
                del kept[found[2]]
                return 200, {}
            if self.script and kept is self.runs:
                self.script.pop(0)(kept[found[2]])
            return 200, self._json(kept[found[2]])
        return 404, {"code": 5, "message": "Not Found"}

    def _add(self, kept, kind, body):
        models = {
            "experiment": "V2beta1Experiment",
            "run": "V2beta1Run",
            "recurring_run": "V2beta1RecurringRun",
        }
        made = checked(body, models[kind])
        if kind != "experiment":
            if made.experiment_id not in self.experiments:
                raise ValueError("no such experiment")
            spec = made.pipeline_spec["pipeline_spec"]
            known = spec["root"]["inputDefinitions"]["parameters"]
            given = made.runtime_config.parameters or {}
            if unknown := given.keys() - known.keys():
                raise ValueError(f"the pipeline has no parameter {sorted(unknown)[0]!r}")
        identity = str(uuid.uuid4())
        setattr(made, f"{kind}_id", identity)
        made.created_at = datetime.now(UTC)
        if kind == "run":
            made.state, made.run_details = "PENDING", api.V2beta1RunDetails(task_details=[])
        if kind == "recurring_run":
            made.status = "ENABLED" if made.mode == "ENABLE" else "DISABLED"
        kept[identity] = made
        return self._json(made)

    def _list(self, kept, name, query):
        found = list(kept.values())
        if "filter" in query:
            (predicate,) = json.loads(query["filter"])["predicates"]
            found = [f for f in found if f.display_name == predicate["stringValue"]]
        if query.get("sort_by", "").endswith("desc"):
            found.reverse()
        size, start = int(query.get("page_size") or 20), int(query.get("page_token") or 0)
        page = [self._json(f) for f in found[start : start + size]]
        more = str(start + size) if start + size < len(found) else ""
        return {name: page, "next_page_token": more, "total_size": len(found)}

    @staticmethod
    def _json(model):
        return api.ApiClient().sanitize_for_serialization(model)


def task(name, state, error=""):
    """A task of a run, as the API reports it."""
    return api.V2beta1PipelineTaskDetail(
        display_name=name,
        state=state,
        start_time=datetime.now(UTC),
        error=api.GoogleRpcStatus(code=2, message=error) if error else None,
    )
