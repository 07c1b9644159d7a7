"""A local server that speaks the v2beta1 API of Kubeflow Pipelines.

Bodies both ways are held to the published schema, of which the models in kfp-server-api are
generated: a field that the schema does not know, a wrong type or a state that does not exist is
answered with 400 when it comes in, as by the real gateway, and fails the test when it goes out.
(The swagger files of 2.17 require no field: all are proto3.) `nodes` are what a real server makes
of a workflow.
"""

import json
import re
import uuid
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api

from tests.http_server import Handler, HttpServer

BASE = "/apis/v2beta1"
INT64 = ("max_concurrency", "interval_second")


def checked(body, kind):
    """The body as a model; ValueError where the schema disagrees."""
    _check(body, kind, kind)
    return api.ApiClient()._ApiClient__deserialize(body, getattr(api, kind))


def _check(value, kind, where):
    if value is None:
        return
    if found := re.fullmatch(r"list\[(.+)\]|dict\(str, (.+)\)", kind):
        expected = list if found[1] else dict
        if not isinstance(value, expected):
            raise ValueError(f"{where}: expected {kind}, got {value!r}")
        for part in value if found[1] else value.values():
            _check(part, found[1] or found[2], where)
        return
    model = getattr(api, kind, None)
    if model is None:
        plain = {"str": str, "bool": bool, "int": int, "object": (dict, list, str, int, float)}
        if where.rpartition(".")[2] in INT64 and isinstance(value, int):
            return  # the JSON form of protobuf takes 64-bit numbers both ways
        if kind == "datetime":
            datetime.fromisoformat(value)
        elif not isinstance(value, plain[kind]) or (isinstance(value, bool) and kind == "int"):
            raise ValueError(f"{where}: expected {kind}, got {value!r}")
    elif not model.openapi_types:  # an enumeration
        if value not in model.allowable_values:
            raise ValueError(f"{where}: {value!r} is none of {model.allowable_values}")
    else:
        wires = {wire: name for name, wire in model.attribute_map.items()}
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected {kind}, got {value!r}")
        for wire, part in value.items():
            if wire not in wires:
                raise ValueError(f"unknown field {wire!r} in {where}")
            _check(part, model.openapi_types[wires[wire]], f"{where}.{wire}")


class KfpServer:
    """Holds experiments, runs and recurring runs; a test moves the runs along."""

    def __init__(self):
        self.experiments, self.runs, self.recurring = {}, {}, {}
        self.fail_next = []  # (status, body) answered before anything else
        self.script = []  # how each further look finds a run: a function of the run
        self.wrong = []  # answers that the schema does not allow: nobody may rely on them
        outer = self

        class Answers(Handler):
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

        self._server = HttpServer(Answers)
        self.address = self._server.address

    def close(self):
        self._server.close()
        assert self.wrong == []

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
        answer = {name: page, "next_page_token": more, "total_size": len(found)}
        kinds = {"experiments": "Experiments", "runs": "Runs", "recurringRuns": "RecurringRuns"}
        return self._allowed(answer, f"V2beta1List{kinds[name]}Response")

    def _json(self, model):
        body = api.ApiClient().sanitize_for_serialization(model)
        return self._allowed(body, type(model).__name__)

    def _allowed(self, answer, kind):
        try:
            _check(answer, kind, kind)
        except ValueError as error:
            self.wrong.append(str(error))
        return answer


def nodes(*steps, workflow="train-and-deploy-x7k2f", begun=None):
    """Details of a run's tasks as the API server reports them: every node of the Argo workflow.

    Args:
        steps: (name, state) in the order in which they began. Failed ones carry no error: the
            server does not fill that field in.
    """
    made, begun = [], begun or datetime.now(UTC)

    def node(name, state):
        made.append(
            api.V2beta1PipelineTaskDetail(
                run_id="r",
                task_id=str(uuid.uuid4()),
                display_name=name,
                state=state,
                create_time=begun,
                start_time=begun + timedelta(seconds=len(made)),
                end_time=begun + timedelta(seconds=len(made) + 1),
                child_tasks=[api.PipelineTaskDetailChildTask(pod_name=f"{workflow}-{len(made)}")],
            )
        )

    running = "RUNNING" if any(state == "RUNNING" for _, state in steps) else "SUCCEEDED"
    for bracket in (workflow, "root-driver", "root", "exit-handler-1-driver", "exit-handler-1"):
        node(bracket, "SUCCEEDED" if bracket.endswith("driver") else running)
    for name, state in steps:
        node(f"{name}-driver", "SUCCEEDED")
        node(name, state)
        node("executor", state)
        if state == "FAILED":
            for attempt in range(3):
                node(f"executor({attempt})", state)
    node("condition-1-driver", "SUCCEEDED")
    return sorted(made, key=lambda n: n.task_id)  # in no order that means anything
