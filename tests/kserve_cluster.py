"""A stand-in of a cluster with KServe 0.21: API server, controllers, served models, Prometheus.

What it does is what their sources say. The API server merges patches (RFC 7396), refuses stale
resource versions, denies what the pipeline's Role does not permit, and holds every InferenceService
to the SDK's schema. The controllers go a step with every request, so that each change is in force
only some looks later. In Knative mode KServe makes a Knative service of the predictor, whose newest
*ready* revision gets the newest share of the traffic; the share of candidates is recorded at every
step. `status.observedGeneration` is that of the transformer, as in KServe.
"""

import copy
import json
import re
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes import client

from k8s.validate import problems
from tests.http_server import Handler, HttpServer

ROOT = Path(__file__).parents[1]
STABLE = yaml.safe_load((ROOT / "k8s/base/inferenceservice.yaml").read_text())
ROLE, _ = yaml.safe_load_all((ROOT / "k8s/base/pipeline-access.yaml").read_text())
ADDRESS = re.compile(r"/apis/([\w.]+)/(\w+)/namespaces/hrnn/(\w+)(?:/([\w-]+))?")
VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}
SLOW = 3  # steps that a pod takes to become ready, and an object to be gone


def merge(value, change):
    """RFC 7396."""
    if not isinstance(change, dict):
        return change
    value = dict(value) if isinstance(value, dict) else {}
    for key, part in change.items():
        if part is None:
            value.pop(key, None)
        else:
            value[key] = merge(value.get(key), part)
    return value


def permitted(verb, group, resource, name):
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and verb in rule["verbs"]
        and name in rule.get("resourceNames", [name])
        for rule in ROLE["rules"]
    )


def variable(container, name):
    return next((e.get("value") for e in container.get("env", []) if e["name"] == name), None)


def candidate(container):
    """Whether it is pinned to one version."""
    return "/versions/" in (variable(container, "HRNN_MODEL_DIR") or "")


class Knative:
    """The Knative service of the predictor."""

    def __init__(self, name):
        self.name, self.spec, self.generation, self.observed = name, None, 0, 0
        self.revisions, self.traffic = [], []  # of revisions: [name, container, age, ready]

    def newest(self, *, ready):
        found = [r for r in self.revisions if r["ready"] or not ready]
        return found[-1]["name"] if found else None

    def step(self, healthy):
        """A step of Knative, the last part of its chain first."""
        if self.spec is None:
            return
        if latest := self.newest(ready=True):
            self.traffic = [
                t | {"revisionName": latest if t["latestRevision"] else t["revisionName"]}
                for t in self.spec["traffic"]
            ]
        for revision in self.revisions:
            revision["age"] += 1
            revision["ready"] |= revision["age"] > SLOW and healthy(revision["container"])
        container = self.spec["template"]["spec"]["containers"][0]
        if not self.revisions or self.revisions[-1]["container"] != container:
            name = f"{self.name}-{self.generation:05d}"
            self.revisions.append(
                {"name": name, "container": copy.deepcopy(container), "age": 0, "ready": False}
            )
        self.observed = self.generation

    def to_json(self):
        created, ready = self.newest(ready=False), self.newest(ready=True)
        container = self.spec["template"]["spec"]["containers"][0]
        reconciled = bool(self.revisions) and self.revisions[-1]["container"] == container
        state = "True" if reconciled and created == ready else "Unknown"
        condition = {"type": "ConfigurationsReady", "status": state}
        if reconciled and self.revisions[-1]["age"] > 2 * SLOW and state != "True":
            condition |= {"status": "False", "message": "CrashLoopBackOff\n(exit code 1)"}
        return {
            "metadata": {"name": self.name, "generation": self.generation},
            "spec": self.spec,
            "status": {
                "observedGeneration": self.observed,
                "latestCreatedRevisionName": created,
                "latestReadyRevisionName": ready,
                "traffic": self.traffic,
                "conditions": [condition],
            },
        }


class Cluster:
    """All of it on one address, in one namespace."""

    def __init__(self, store, mode):
        self.store, self.mode = store, mode
        self.objects, self.ages = {}, {}
        self.knative = Knative("hrnn-meta-predictor")
        self.transformers = set()  # what the stable transformer's pods were made of
        self.calls, self.requests = [], 0
        self.broken = set()  # what does not work
        self.figures = {}  # of Prometheus: (whose, which) to value
        self.queries = []
        self.exposed = 0  # largest share of the live traffic that a candidate ever had
        self.served = None  # the model that the stable predictors hold
        self.watchers = []  # called with every API call: (verb, name)
        self._lock = threading.RLock()
        outer = self

        class Answers(Handler):
            protocol_version = "HTTP/1.1"
            wbufsize = (
                2**16
            )  # head and body in one packet, or the client's delayed ACK is waited for

            def _answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                kind = self.headers.get("Content-Type", "")
                if self.command == "PATCH" and kind != "application/merge-patch+json":
                    status, answer = 415, {"message": f"no patch of type {kind}"}
                else:
                    with outer._lock:
                        status, answer = outer.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

        self._server = HttpServer(Answers)
        self.address = self._server.address
        stable = copy.deepcopy(STABLE)
        stable["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] = mode
        assert self._write("hrnn-meta", stable)[0] == 200
        for _ in range(10):
            self.step()

    def close(self):
        self._server.close()

    def api(self):
        configuration = client.Configuration(host=self.address)
        return client.CustomObjectsApi(client.ApiClient(configuration))

    # What people ask

    def answer(self, method, path, body):
        url = urlsplit(path)
        self.step()
        if url.path == "/api/v1/query":
            return 200, self._metrics(parse_qs(url.query)["query"][0])
        if url.path.endswith(":predict"):
            return self._predict(url.path.split("/")[1])
        group, _, resource, name = ADDRESS.fullmatch(url.path).groups()
        verb = VERBS[method]
        name = name or body["metadata"]["name"]
        self.calls.append((verb, resource, name))
        for watcher in self.watchers:
            watcher(verb, name)
        if "api" in self.broken:
            return 500, {"message": "etcd is gone"}
        if not permitted(verb, group, resource, None if verb == "create" else name):
            return 403, {"message": f"not permitted: {verb} {resource} {name}"}
        if resource == "services":
            exists = name == self.knative.name and self.knative.spec is not None
            return (200, self.knative.to_json()) if exists else (404, {"message": "not found"})
        return self._resource(verb, name, body)

    def _resource(self, verb, name, body):
        if verb == "create":
            if name in self.objects:
                return 409, {"message": f"{name} exists"}
            return self._write(name, body)
        if name not in self.objects:
            return 404, {"message": "not found"}
        now = self.objects[name]
        if verb == "get":
            return 200, now
        if verb == "delete":  # KServe's finalizer keeps it for a while
            now["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
            self.ages[name] = 0
            return 200, now
        stated = body.get("metadata", {}).pop("resourceVersion", None)
        if stated not in (None, now["metadata"]["resourceVersion"]):
            return 409, {"message": "the object has been modified"}
        return self.merged(name, body)

    def merged(self, name, body):
        """Write a change of what is there."""
        return self._write(name, merge(self.objects[name], body))

    def _write(self, name, body):
        told = copy.deepcopy({k: v for k, v in body.items() if k != "status"})
        before = self.objects.get(name, {"metadata": {}})
        metadata = told["metadata"]
        for generated in ("generation", "resourceVersion"):
            metadata.pop(generated, None)
        if wrong := problems([told]):
            return 422, {"message": wrong[0]}
        metadata["generation"] = before["metadata"].get("generation", 0) + 1
        metadata["resourceVersion"] = str(int(before["metadata"].get("resourceVersion", 0)) + 1)
        metadata["namespace"] = "hrnn"
        told["status"] = before.get("status", {})
        self.objects[name] = told
        if "status" not in before:
            self.ages[name] = 0
        return 200, told

    # The controllers

    def step(self):
        """Everybody goes on by a little."""
        champion = self.store.champion()
        if champion is not None and not ("stuck" in self.broken and self.served):
            self.served = champion.version
        for name in list(self.objects):
            self.ages[name] += 1
            thing = self.objects[name]
            if "deletionTimestamp" in thing["metadata"]:
                if self.ages[name] > SLOW:
                    del self.objects[name]
            elif self.mode == "Knative" and name == "hrnn-meta":
                self._knative(thing)
            else:
                self._standard(name, thing)

    def _healthy(self, container):
        if candidate(container):
            return "pods" not in self.broken
        return self.served is not None  # a predictor without a model does not start

    def _conditions(self, thing, ready):
        state = "True" if ready else "False"
        predictor = {"type": "PredictorReady", "status": state}
        if not ready:
            predictor["message"] = "CrashLoopBackOff\n(exit code 1)"
        thing["status"] |= {
            "observedGeneration": 1,  # of the transformer, which does not change
            "deploymentMode": self.mode,
            "conditions": [{"type": "Ready", "status": state}, predictor],
        }
        if ready:
            name = thing["metadata"]["name"]
            thing["status"]["url"] = f"{self.address}/{name}"
        metadata = thing["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)

    def _standard(self, name, thing):
        if self.ages[name] > SLOW:
            broken = "pods" in self.broken and name.endswith("-canary")
            ready = not broken and (name.endswith("-canary") or self.served is not None)
            if (ready and "url" not in thing["status"]) or "conditions" not in thing["status"]:
                self._conditions(thing, ready)

    def _knative(self, thing):
        ksvc = self.knative
        # KServe's status of Knative's: the last revision that had all of the traffic is kept.
        seen = thing["status"].setdefault("components", {}).setdefault("predictor", {})
        before = copy.deepcopy(thing["status"])
        created, ready = ksvc.newest(ready=False), ksvc.newest(ready=True)
        seen |= {"latestCreatedRevision": created, "latestReadyRevision": ready}
        for target in ksvc.traffic:
            if target["latestRevision"] and target["revisionName"] == ready:
                rolled = seen.get("latestRolledoutRevision")
                if rolled != ready and target["percent"] == 100:
                    seen["previousRolledoutRevision"] = rolled
                    seen["latestRolledoutRevision"] = ready
                elif rolled == ready == created and target["percent"] < 100:
                    total = sum(t["percent"] for t in ksvc.traffic if t["revisionName"] == ready)
                    if total == 100 and seen.get("previousRolledoutRevision"):
                        seen["latestRolledoutRevision"] = seen["previousRolledoutRevision"]
        if ksvc.revisions:
            conditions = ksvc.to_json()["status"]["conditions"]
            is_ready = conditions[0]["status"] == "True" and ksvc.observed == ksvc.generation
            if is_ready != (thing["status"].get("conditions", [{}])[0].get("status") == "True"):
                self._conditions(thing, is_ready)
        if thing["status"] != before:
            metadata = thing["metadata"]
            metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)
        ksvc.step(self._healthy)
        self._expose()
        # KServe to Knative.
        metadata, spec = thing["metadata"], thing["spec"]
        handed_on = [metadata.get("annotations", {}), metadata.get("labels", {})]
        self.transformers.add(json.dumps([spec["transformer"], handed_on], sort_keys=True))
        percent, rolled = (
            spec["predictor"].get("canaryTrafficPercent"),
            seen.get("latestRolledoutRevision"),
        )
        traffic = [{"latestRevision": True, "percent": 100}]
        if percent is not None and rolled:
            traffic[0]["percent"] = percent
            rest = {"latestRevision": False, "revisionName": rolled, "percent": 100 - percent}
            traffic.append(rest | {"tag": "prev"})
        container = copy.deepcopy(spec["predictor"]["containers"][0])
        container["annotations"] = handed_on  # of the pods; here for comparison
        wanted = {"template": {"spec": {"containers": [container]}}, "traffic": traffic}
        if wanted != ksvc.spec:
            ksvc.spec, ksvc.generation = wanted, ksvc.generation + 1

    def _expose(self):
        containers = {r["name"]: r["container"] for r in self.knative.revisions}
        share = sum(
            t["percent"] for t in self.knative.traffic if candidate(containers[t["revisionName"]])
        )
        self.exposed = max(self.exposed, share)

    # The models

    def pinned(self, name):
        """The version to which pods that answer at this name are pinned, None if to none."""
        self.requests += 1
        if self.mode == "Knative":
            at = (self.requests * 37) % 100
            for target in self.knative.traffic:
                at -= target["percent"]
                if at < 0:
                    revisions = {r["name"]: r["container"] for r in self.knative.revisions}
                    container = revisions[target["revisionName"]]
                    break
        else:
            container = self.objects[name]["spec"]["predictor"]["containers"][0]
        address = variable(container, "HRNN_MODEL_DIR")
        return address and address.rpartition("/")[2]

    def _predict(self, name):
        pinned = self.pinned(name)
        version = pinned or self.served
        if pinned and "canary" in self.broken:
            return 500, {"error": "boom"}
        if pinned and "nan" in self.broken:
            return 200, self._prediction(version, float("nan"))
        if pinned and "seldom" in self.broken and self.requests % 3 == 0:
            return 500, {"error": "boom"}
        if "service" in self.broken and not pinned and version == "v2":
            return 503, {"error": "boom"}
        return 200, self._prediction(version, -1.0)

    @staticmethod
    def _prediction(version, score):
        items = [{"item_id": "i", "score": score}]
        return {"predictions": [{"model_version": version, "degraded": [], "items": items}]}

    def _metrics(self, query):
        """One value for all; `figures` has others for the candidate's own pods."""
        if "prometheus" in self.broken:
            return {"status": "error", "error": "no"}
        self.queries.append(query)
        which = "p99" if "histogram_quantile" in query else "errors"
        selected = re.search(r'inferenceservice="([^"]+)"|revision="([^"]+)"', query)
        whose = "all"
        if selected and selected[1] == "hrnn-meta-canary":
            whose = "canary"
        elif selected and selected[2]:
            revisions = {r["name"]: r["container"] for r in self.knative.revisions}
            pinned = candidate(revisions[selected[2]])
            whose = "canary" if pinned and 'role="predictor"' in query else "all"
        value = self.figures.get((whose, which), 0.0)
        result = [] if value is None else [{"metric": {}, "value": [0, str(value)]}]
        return {"status": "success", "data": {"resultType": "vector", "result": result}}
