"""The few calls of the Kubernetes API that a canary needs, for KServe 0.21's two modes.

Stable predictors follow the model store's champion; a canary's predictor is pinned to one bundle.
All that is known of a canary is on the cluster, in its mark (whose it is, until when, what was
there before): a run that was killed in between is put right by the next one, which ends the canary.
The mark goes with the last trace of the canary; what carries none is somebody else's and is left
alone: a revision that an operator pins, a service that only has the canary's name.

Knative mode: the predictor's `canaryTrafficPercent` gives the new revision its share of the live
traffic; the transformer reaches both revisions through the predictor's route. The mark is a
variable of the predictor's container, as KServe hands annotations and labels of the service on to
the pods of all its parts, which would be replaced with every change of one. Whether a change is in
force says the Knative service: `status.observedGeneration` of an InferenceService is the generation
of one of its parts, not its own.

Standard mode: KServe's own canary (`spec.canary`) does not fit a service with a transformer: it
sends its share of the traffic to the predictor past the transformer, and wants a predictor with a
`storageUri`. So the canary is a second InferenceService with a transformer of its own, which gets
test requests and no live traffic.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

from model.errors import ConflictError, InputError, UnavailableError

GROUP, API_VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
KNATIVE = ("serving.knative.dev", "v1", "services")
MODE = "serving.kserve.io/deploymentMode"
MODEL_DIR, PREDICTOR_HOST = "HRNN_MODEL_DIR", "HRNN_PREDICTOR_HOST"
MARK_VARIABLE = "HRNN_CANARY"  # of the predictor's container; the mark in Knative mode
MARK_ANNOTATION = "hrnn-meta/canary"  # of the second InferenceService, in Standard mode
ENDING = "ending"  # phase of a mark: the predictor is its own again, the share still there
CALL_SECONDS = 30
PASS_ON_SECONDS = 30.0  # KServe takes up a change within a second or two
Json = dict[str, Any]


class NotOursError(ConflictError):
    """The canary on the service is another run's, which may still be trying it."""


@dataclass(frozen=True)
class Mark:
    """Whose a canary is."""

    run_id: str
    version: str
    until: float  # Unix seconds: a run that has not ended it by then is dead
    before: Json | None = None  # the variable that the canary replaced
    phase: str = ""  # or `ENDING`

    @classmethod
    def read(cls, text: str | None) -> "Mark | None":
        """The mark in a variable or annotation; None if there is none."""
        if not text:
            return None
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls("unknown", "unknown", 0.0)  # somebody edited it: nobody waits for it

    def write(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def check(self, run_id: str, where: str) -> None:
        """Raises NotOursError when another run may still be trying it."""
        if self.run_id != run_id and self.until > time.time():
            end = datetime.fromtimestamp(self.until, UTC).isoformat(timespec="seconds")
            raise NotOursError(
                f"run {self.run_id} is trying a canary of {self.version} on {where} and will have "
                f"ended it by {end}: wait for it. If that run is dead, `hrnn models canary --end` "
                "takes the canary away at once"
            )


class Served(Protocol):
    """Something that answers requests."""

    def problem(self) -> str:
        """Why it is not ready; "" when it is."""
        ...

    def url(self) -> str:
        """Where it answers, once it is ready."""
        ...

    def labels(self) -> str:
        """Prometheus' matchers for its pods and no others, once it is ready."""
        ...


class Canary(Served, Protocol):
    """A candidate served beside the champion; `url` may lead to both."""

    def begin(self, model_dir: str, mark: Mark) -> None:
        """Serve the bundle at this address."""
        ...

    def end(self, run_id: str, *, force: bool = False) -> str:
        """Go a step towards leaving the stable service alone; what is waited for, "" at the end.

        The first step takes the live traffic from it. No step gives it more than it had.

        Args:
            force: also another run's that has time left.

        Raises:
            NotOursError: another run's, and it has time left.
        """
        ...

    def mark(self) -> Mark | None:
        """Whose canary there is, None if none."""
        ...


@dataclass(frozen=True)
class RunningService:
    """A service that was started elsewhere, as `hrnn serve` does."""

    address: str

    def problem(self) -> str:
        return ""  # whether it answers show the requests

    def url(self) -> str:
        return self.address.rstrip("/")

    def labels(self) -> str:
        return 'role="transformer"'


class InferenceServices:
    """InferenceServices of one namespace; every call has a deadline."""

    def __init__(self, namespace: str, api: Any = None) -> None:
        """Args: api: a `kubernetes.client.CustomObjectsApi`; None: the cluster this runs in.

        Raises:
            InputError: this is no pod, and there is no kubeconfig.
        """
        from kubernetes import client, config

        self.inside = False  # addresses of the cluster's own network can be reached
        if api is None:
            try:
                try:
                    config.load_incluster_config()
                    self.inside = True
                except config.ConfigException:
                    config.load_kube_config()
            except config.ConfigException as error:
                raise InputError(f"no cluster to deploy to: {error}") from None
            api = client.CustomObjectsApi()
        self.namespace, self._api = namespace, api

    def get(self, name: str) -> Json | None:
        """The service, None if there is none."""
        found: Json | None = self._call("get", name)
        return found

    def existing(self, name: str) -> Json:
        """The service.

        Raises:
            InputError: there is none.
        """
        service = self.get(name)
        if service is None:
            raise InputError(
                f"there is no InferenceService {self.namespace}/{name}: apply k8s/ first"
            )
        return service

    def knative(self, name: str) -> Json | None:
        """The Knative service of a part of one, None if there is none (yet)."""
        found: Json | None = self._call("get", name, kind=KNATIVE)
        return found

    def create(self, service: Json) -> None:
        """Create one.

        Raises:
            ConflictError: there is one of its name.
        """
        self._call("create", service["metadata"]["name"], service)

    def edit(self, name: str, change: Callable[[Json], Json]) -> None:
        """Merge the change that is made of the service as it is; null removes.

        Lists are replaced whole, so a change of another writer in between is read first.
        """
        for _ in range(5):
            service = self.existing(name)
            patch = change(service)
            patch["metadata"] = {"resourceVersion": service["metadata"].get("resourceVersion")}
            try:
                self._call("patch", name, patch)
            except ConflictError:
                continue
            return
        raise ConflictError(f"InferenceService {self.namespace}/{name} changes all the time")

    def delete(self, name: str) -> None:
        """Delete it, if it is there."""
        self._call("delete", name)

    def _call(
        self,
        verb: str,
        name: str,
        body: Json | None = None,
        kind: tuple[str, str, str] = (GROUP, API_VERSION, PLURAL),
    ) -> Any:
        import urllib3
        from kubernetes.client import ApiException

        group, version, plural = kind
        where = [group, version, self.namespace, plural]
        where += [name] if verb != "create" else []
        function = getattr(self._api, f"{verb}_namespaced_custom_object")
        try:
            return function(*where, *([body] if body else []), _request_timeout=CALL_SECONDS)
        except ApiException as error:
            if error.status == 404 and verb in ("get", "delete"):
                return None
            told = " ".join(str(error.body or error.reason).split())[:300]
            kind_of_error = ConflictError if error.status == 409 else UnavailableError
            raise kind_of_error(
                f"Kubernetes answered {error.status} to {verb} {plural}.{group} "
                f"{self.namespace}/{name}: {told}"
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnavailableError(
                f"Kubernetes cannot be reached: {type(error).__name__}"
            ) from None


class StableService:
    """The InferenceService that follows the champion."""

    def __init__(self, services: InferenceServices, name: str, address: str = "") -> None:
        """Args: address: where it answers, if not where its status says."""
        self._services, self.name, self._address = services, name, address.rstrip("/")

    def problem(self) -> str:
        return _not_ready(self._services.existing(self.name))

    def url(self) -> str:
        return self._address or _url(self._services.existing(self.name), self._services.inside)

    def labels(self) -> str:
        return f'role="transformer", inferenceservice="{self.name}"'


class KnativeCanary:
    """A share of the live traffic for a new revision of the predictor."""

    def __init__(self, services: InferenceServices, stable: StableService, percent: int) -> None:
        self._services, self._stable, self._percent = services, stable, percent
        self._name = stable.name
        self._withdrawn_at: float | None = None
        self._ended_here = False  # whether its own revision is made once more, without the mark

    def mark(self) -> Mark | None:
        return _mark_of(self._services.existing(self._name))

    def begin(self, model_dir: str, mark: Mark) -> None:
        def change(service: Json) -> Json:
            predictor = service["spec"]["predictor"]
            if "canaryTrafficPercent" in predictor:
                raise InputError(
                    f"InferenceService {self._name} has canaryTrafficPercent "
                    f"{predictor['canaryTrafficPercent']}, which is not ours: remove it first"
                )
            status = service.get("status", {}).get("components", {}).get("predictor", {})
            waiting = _not_ready(service)
            if waiting or not status.get("latestRolledoutRevision"):
                raise UnavailableError(
                    f"InferenceService {self._name} is not ready itself "
                    f"({waiting or 'no revision has all of the traffic'}): a canary would have "
                    "nothing to fall back on"
                )
            before = _entry(predictor, MODEL_DIR)
            marked = replace(mark, before=before).write()
            containers = _with(predictor, MODEL_DIR, {"name": MODEL_DIR, "value": model_dir})
            pinned = {"containers": containers}
            containers = _with(pinned, MARK_VARIABLE, {"name": MARK_VARIABLE, "value": marked})
            # In one change: a share below 100 with the revision of before as the newest one makes
            # KServe go back to the one before that.
            return _predictor(canaryTrafficPercent=self._percent, containers=containers)

        self._services.edit(self._name, change)
        self._withdrawn_at, self._ended_here = None, False

    def problem(self) -> str:
        service = self._services.existing(self._name)
        mark = _mark_of(service)
        if mark is None or service["spec"]["predictor"].get("canaryTrafficPercent") == 0:
            raise ConflictError(f"the canary on {self._name} was taken away by somebody else")
        knative = self._knative()
        waiting = _not_passed_on(knative, mark, self._percent) or _not_configured(knative)
        if waiting := waiting or _not_ready(service):
            return waiting
        revision, share = _newest(knative), 0
        for target in knative["status"].get("traffic", []):
            if target.get("revisionName") == revision:
                share += target.get("percent") or 0
        return "" if share == self._percent else f"revision {revision} gets {share}% of the traffic"

    def url(self) -> str:
        return self._stable.url()

    def labels(self) -> str:
        # The transformer is the champion's too: only predictors answer for one revision.
        return f'role="predictor", revision="{_newest(self._knative())}"'

    def end(self, run_id: str, *, force: bool = False) -> str:
        service = self._services.existing(self._name)
        mark, percent = _mark_of(service), service["spec"]["predictor"].get("canaryTrafficPercent")
        if mark is None:  # a share without a mark is an operator's, also one of 0
            if not self._ended_here:
                return ""
            # Until then a next canary would have nothing to fall back on.
            knative = self._knative()
            waiting = _not_passed_on(knative, None, None) or _not_configured(knative)
            return waiting or _not_ready(service)
        if not force:
            mark.check(run_id, self._name)
        if mark.phase != ENDING:
            if percent != 0:
                self._edit(mark, lambda _: _predictor(canaryTrafficPercent=0))
            if self._withdrawn_at is None:
                self._withdrawn_at = time.monotonic()
            # Until KServe has taken up the canary, its absence would prove nothing later on. A
            # KServe that refuses it never does.
            waiting = _not_passed_on(self._knative(), mark, 0)
            if waiting and time.monotonic() < self._withdrawn_at + PASS_ON_SECONDS:
                return waiting
            self._edit(mark, _restored)
            return "the predictor's own revision is being made again"
        # The newest revision that is ready gets all of the traffic once the field is gone: it
        # must be the service's own. Until the one without the mark is ready, that one serves.
        knative = self._knative()
        if waiting := _not_passed_on(knative, mark, None) or _not_configured(knative):
            return waiting
        self._edit(mark, _unmarked)
        self._ended_here = True
        return "the predictor's own revision is being made without the mark"

    def _edit(self, mark: Mark, change: Callable[[Json], Json]) -> None:
        """Change what still carries this mark.

        Raises:
            UnavailableError: it does not any more; to be looked at anew.
        """

        def checked(service: Json) -> Json:
            if _mark_of(service) != mark:
                raise UnavailableError(
                    f"somebody else changed the canary on {self._name} at the same moment"
                )
            return change(service)

        self._services.edit(self._name, checked)

    def _knative(self) -> Json:
        return self._services.knative(f"{self._name}-predictor") or {}


class StandardCanary:
    """A second InferenceService beside the first."""

    def __init__(self, services: InferenceServices, stable: StableService) -> None:
        self._services, self._stable, self._name = services, stable, f"{stable.name}-canary"

    def mark(self) -> Mark | None:
        service = self._services.get(self._name)
        return None if service is None else _mark_of(service)

    def begin(self, model_dir: str, mark: Mark) -> None:
        service = self._services.existing(self._stable.name)
        there = self._services.get(self._name)
        if there is not None and _mark_of(there) is None:
            raise InputError(
                f"there is an InferenceService {self._name} that is not ours: a canary needs that "
                "name, remove it first"
            )
        spec = copy.deepcopy(service["spec"])
        for part in ("predictor", "transformer"):
            if part in spec:
                spec[part] |= {"minReplicas": 1, "maxReplicas": 1}
        pinned = {"name": MODEL_DIR, "value": model_dir}
        spec["predictor"]["containers"] = _with(spec["predictor"], MODEL_DIR, pinned)
        # For its metrics, by which an alert knows that nobody has ended it.
        marked = {"name": MARK_VARIABLE, "value": mark.write()}
        spec["predictor"]["containers"] = _with(spec["predictor"], MARK_VARIABLE, marked)
        if "transformer" in spec:
            host = _variable(spec["transformer"], PREDICTOR_HOST)
            if host is None:
                raise InputError(
                    f"InferenceService {self._stable.name}: its transformer has no variable "
                    f"{PREDICTOR_HOST}, so a canary's cannot be led to the canary's predictor"
                )
            own = host.replace(f"{self._stable.name}-predictor", f"{self._name}-predictor")
            spec["transformer"]["containers"] = _with(
                spec["transformer"], PREDICTOR_HOST, {"name": PREDICTOR_HOST, "value": own}
            )
        self._services.create(
            {
                "apiVersion": f"{GROUP}/{API_VERSION}",
                "kind": "InferenceService",
                "metadata": {
                    "name": self._name,
                    "namespace": self._services.namespace,
                    "labels": dict(service["metadata"].get("labels", {})),
                    "annotations": {MODE: "Standard", MARK_ANNOTATION: mark.write()},
                },
                "spec": spec,
            }
        )

    def problem(self) -> str:
        service = self._services.get(self._name)
        if service is None or "deletionTimestamp" in service["metadata"]:
            raise ConflictError(f"the canary {self._name} was taken away by somebody else")
        return _not_ready(service)

    def url(self) -> str:
        return _url(self._services.existing(self._name), self._services.inside)

    def labels(self) -> str:
        return f'role="transformer", inferenceservice="{self._name}"'

    def end(self, run_id: str, *, force: bool = False) -> str:
        service = self._services.get(self._name)
        if service is None:
            return ""
        mark = _mark_of(service)
        if mark is None:
            return ""  # it has the canary's name and is somebody else's
        if not force:
            mark.check(run_id, self._stable.name)
        if "deletionTimestamp" not in service["metadata"]:
            self._services.delete(self._name)
        return f"InferenceService {self._name} is being deleted"


def canary_of(services: InferenceServices, stable: StableService, percent: int) -> Canary:
    """The canary that fits the service's deployment mode (its annotation, else its status)."""
    service = services.existing(stable.name)
    mode = service["metadata"].get("annotations", {}).get(MODE) or service.get("status", {}).get(
        "deploymentMode", ""
    )
    if mode in ("Knative", "Serverless"):
        return KnativeCanary(services, stable, percent)
    if mode in ("Standard", "RawDeployment"):
        return StandardCanary(services, stable)
    raise InputError(f"InferenceService {stable.name}: deployment mode {mode!r} is not known")


def _newest(knative: Json) -> str:
    """The newest revision that is ready."""
    return str(knative.get("status", {}).get("latestReadyRevisionName", ""))


def _not_passed_on(knative: Json, mark: Mark | None, percent: int | None) -> str:
    """Whether KServe still has to give the Knative service this mark (None: none) and share."""
    spec = knative.get("spec")
    if spec is None:
        return "Knative has no service for the predictor yet"
    passed_on = _variable(spec["template"]["spec"], MARK_VARIABLE) == (mark and mark.write())
    if percent is not None:
        newest = [t.get("percent") for t in spec.get("traffic", []) if t.get("latestRevision")]
        passed_on = passed_on and newest == [percent]
    return "" if passed_on else "KServe has not taken up the change yet"


def _not_configured(knative: Json) -> str:
    """Whether Knative still has to make the newest revision ready."""
    status = knative.get("status", {})
    if status.get("observedGeneration") != knative["metadata"].get("generation"):
        return "Knative has not looked at it yet"
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    condition = conditions.get("ConfigurationsReady", {"status": "Unknown"})
    newest = status.get("latestCreatedRevisionName")
    if condition["status"] == "True" and newest == status.get("latestReadyRevisionName"):
        return ""
    return f"revision {newest}: {_said(condition)}"


def _not_ready(service: Json) -> str:
    conditions = {c["type"]: c for c in service.get("status", {}).get("conditions", [])}
    ready = conditions.get("Ready")
    if ready is None:
        return "it has no status yet"
    if ready["status"] == "True":
        return ""
    unready = {name: c for name, c in conditions.items() if c["status"] != "True"}
    return "; ".join(f"{name}: {_said(c)}" for name, c in unready.items())


def _said(condition: Json) -> str:
    text = condition.get("message") or condition.get("reason") or condition["status"]
    return " ".join(str(text).split())


def _url(service: Json, inside: bool) -> str:
    """Its address in the cluster's network if that can be reached, else the one for the world."""
    status = service.get("status", {})
    url = (status.get("address", {}).get("url") if inside else None) or status.get("url")
    if not url:
        raise UnavailableError(f"InferenceService {service['metadata']['name']} has no address yet")
    parts = urlsplit(str(url))
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _mark_of(service: Json) -> Mark | None:
    annotations = service["metadata"].get("annotations", {})
    variable = _variable(service["spec"]["predictor"], MARK_VARIABLE)
    return Mark.read(annotations.get(MARK_ANNOTATION) or variable)


def _predictor(**fields: Any) -> Json:
    return {"spec": {"predictor": fields}}


def _restored(service: Json) -> Json:
    """The predictor as it was before it was pinned, but for the mark, which says so."""
    mark = _mark_of(service)
    assert mark is not None  # noqa: S101 - for the type checker; `_edit` has seen it
    containers = _with(service["spec"]["predictor"], MODEL_DIR, mark.before)
    ending = {"name": MARK_VARIABLE, "value": replace(mark, phase=ENDING).write()}
    return _predictor(containers=_with({"containers": containers}, MARK_VARIABLE, ending))


def _unmarked(service: Json) -> Json:
    """Without the mark and without the share that goes with it; another share is not ours."""
    predictor = service["spec"]["predictor"]
    containers = _with(predictor, MARK_VARIABLE, None)
    if predictor.get("canaryTrafficPercent") != 0:
        return _predictor(containers=containers)
    return _predictor(containers=containers, canaryTrafficPercent=None)


def _entry(part: Json, name: str) -> Json | None:
    """A variable of the first container."""
    for variable in part["containers"][0].get("env", []):
        if variable["name"] == name:
            return dict(variable)
    return None


def _variable(part: Json, name: str) -> str | None:
    entry = _entry(part, name)
    return None if entry is None else str(entry.get("value", ""))


def _with(part: Json, name: str, entry: Json | None) -> list[Json]:
    """The containers with a variable of the first set (None: left out), in its place."""
    containers = copy.deepcopy(part["containers"])
    variables = containers[0].get("env", [])
    names = [v["name"] for v in variables]
    at = names.index(name) if name in names else len(names)
    containers[0]["env"] = [*variables[:at], *([entry] if entry else []), *variables[at + 1 :]]
    return containers
