"""The few calls of the Kubernetes API that a canary needs, for KServe 0.21's two modes.

Stable predictors follow the model store's champion; a canary's predictor is pinned to one bundle.
Beginning and ending a canary keep no state here: a run that was killed in between is put right by
the next one, which begins (or ends) the same canary.

Knative mode: the predictor's `canaryTrafficPercent` gives the new revision its share of the live
traffic; the transformer reaches both revisions through the predictor's route.

Standard mode: KServe's own canary (`spec.canary`) does not fit a service with a transformer: it
sends its share of the traffic to the predictor past the transformer, and wants a predictor with a
`storageUri`. So the canary is a second InferenceService with a transformer of its own, which gets
test requests and no live traffic.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

from model.errors import InputError, UnavailableError

GROUP, API_VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
MODE = "serving.kserve.io/deploymentMode"
PINNED = "hrnn-meta/model-dir-before"  # annotation: the variable before a canary pinned it
MODEL_DIR, PREDICTOR_HOST = "HRNN_MODEL_DIR", "HRNN_PREDICTOR_HOST"
CALL_SECONDS = 30
Json = dict[str, Any]


class Canary(Protocol):
    """A candidate served beside the champion."""

    def begin(self, model_dir: str) -> None:
        """Serve the bundle at this address."""
        ...

    def problem(self) -> str:
        """Why it is not ready; "" when it is."""
        ...

    def url(self) -> str:
        """Where it, or the service of which it has a share, answers."""
        ...

    def end(self) -> None:
        """Leave only the stable service; repeating it changes nothing."""
        ...


class InferenceServices:
    """InferenceServices of one namespace; every call has a deadline."""

    def __init__(self, namespace: str, api: Any = None) -> None:
        """Args: api: a `kubernetes.client.CustomObjectsApi`; None: the cluster this runs in.

        Raises:
            UnavailableError: this is no pod, and there is no kubeconfig.
        """
        from kubernetes import client, config

        if api is None:
            try:
                try:
                    config.load_incluster_config()
                except config.ConfigException:
                    config.load_kube_config()
            except config.ConfigException as error:
                raise UnavailableError(f"no cluster to deploy to: {error}") from None
            api = client.CustomObjectsApi()
        self.namespace, self._api = namespace, api

    def get(self, name: str) -> Json | None:
        """The service, None if there is none."""
        return self._call(self._api.get_namespaced_custom_object, name, missing=True)

    def put(self, service: Json) -> None:
        """Create it, or put it in place of the one of its name."""
        name = service["metadata"]["name"]
        if (now := self.get(name)) is None:
            self._call(self._api.create_namespaced_custom_object, None, service)
            return
        service = copy.deepcopy(service)
        service["metadata"]["resourceVersion"] = now["metadata"].get("resourceVersion")
        self._call(self._api.replace_namespaced_custom_object, name, service)

    def patch(self, name: str, change: Json) -> None:
        """Merge a change; null removes."""
        self._call(self._api.patch_namespaced_custom_object, name, change)

    def delete(self, name: str) -> None:
        """Delete it, if it is there."""
        self._call(self._api.delete_namespaced_custom_object, name, missing=True)

    def _call(
        self, function: Callable[..., Any], name: str | None, *body: Json, missing: bool = False
    ) -> Any:
        import urllib3
        from kubernetes.client import ApiException

        where = [GROUP, API_VERSION, self.namespace, PLURAL, *([name] if name else [])]
        try:
            return function(*where, *body, _request_timeout=CALL_SECONDS)
        except ApiException as error:
            if missing and error.status == 404:
                return None
            told = str(error.body or error.reason).strip()[:300]
            raise UnavailableError(
                f"Kubernetes answered {error.status} about InferenceService "
                f"{self.namespace}/{name or body[0]['metadata']['name']}: {told}"
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnavailableError(
                f"Kubernetes cannot be reached: {type(error).__name__}"
            ) from None


class KnativeCanary:
    """A share of the live traffic for a new revision of the predictor."""

    def __init__(self, services: InferenceServices, name: str, percent: int) -> None:
        self._services, self._name, self._percent = services, name, percent

    def begin(self, model_dir: str) -> None:
        service = _existing(self._services, self._name)
        before = _variable(service["spec"]["predictor"], MODEL_DIR)
        annotations = service["metadata"].get("annotations", {})
        self._services.patch(
            self._name,
            {
                "metadata": {"annotations": {PINNED: annotations.get(PINNED, before or "")}},
                "spec": {
                    "predictor": {
                        "canaryTrafficPercent": self._percent,
                        "containers": _with_variable(
                            service["spec"]["predictor"], MODEL_DIR, model_dir
                        ),
                    }
                },
            },
        )

    def problem(self) -> str:
        service = _existing(self._services, self._name)
        if waiting := _not_ready(service):
            return waiting
        status = service["status"].get("components", {}).get("predictor", {})
        created, ready = status.get("latestCreatedRevision"), status.get("latestReadyRevision")
        if not created or created != ready:
            return f"revision {created} is not ready"
        shares = {t.get("revisionName"): t.get("percent") for t in status.get("traffic", [])}
        if shares.get(created) != self._percent:
            return f"revision {created} gets {shares.get(created, 0)}% of the traffic"
        return ""

    def url(self) -> str:
        return _url(_existing(self._services, self._name))

    def end(self) -> None:
        service = _existing(self._services, self._name)
        annotations = service["metadata"].get("annotations", {})
        if PINNED not in annotations:
            return
        predictor = service["spec"]["predictor"]
        self._services.patch(
            self._name,
            {
                "metadata": {"annotations": {PINNED: None}},
                "spec": {
                    "predictor": {
                        "canaryTrafficPercent": None,
                        "containers": _with_variable(
                            predictor, MODEL_DIR, annotations[PINNED] or None
                        ),
                    }
                },
            },
        )


class StandardCanary:
    """A second InferenceService beside the first."""

    def __init__(self, services: InferenceServices, name: str) -> None:
        self._services, self._stable, self._name = services, name, f"{name}-canary"

    def begin(self, model_dir: str) -> None:
        service = _existing(self._services, self._stable)
        spec = copy.deepcopy(service["spec"])
        for part in ("predictor", "transformer"):
            if part in spec:
                spec[part] |= {"minReplicas": 1, "maxReplicas": 1}
        predictor = spec["predictor"]
        predictor["containers"] = _with_variable(predictor, MODEL_DIR, model_dir)
        if "transformer" in spec:
            host = _variable(spec["transformer"], PREDICTOR_HOST)
            if host is None:
                raise InputError(
                    f"InferenceService {self._stable}: its transformer has no variable "
                    f"{PREDICTOR_HOST}, so a canary's cannot be led to the canary's predictor"
                )
            own = host.replace(f"{self._stable}-predictor", f"{self._name}-predictor")
            spec["transformer"]["containers"] = _with_variable(
                spec["transformer"], PREDICTOR_HOST, own
            )
        self._services.put(
            {
                "apiVersion": f"{GROUP}/{API_VERSION}",
                "kind": "InferenceService",
                "metadata": {
                    "name": self._name,
                    "namespace": self._services.namespace,
                    "labels": dict(service["metadata"].get("labels", {})),
                    "annotations": {MODE: "Standard"},
                },
                "spec": spec,
            }
        )

    def problem(self) -> str:
        return _not_ready(_existing(self._services, self._name))

    def url(self) -> str:
        return _url(_existing(self._services, self._name))

    def end(self) -> None:
        self._services.delete(self._name)


def canary_of(services: InferenceServices, name: str, percent: int) -> Canary:
    """The canary that fits the service's deployment mode (its annotation, else its status)."""
    service = _existing(services, name)
    mode = service["metadata"].get("annotations", {}).get(MODE) or service.get("status", {}).get(
        "deploymentMode", ""
    )
    if mode in ("Knative", "Serverless"):
        return KnativeCanary(services, name, percent)
    if mode in ("Standard", "RawDeployment"):
        return StandardCanary(services, name)
    raise InputError(f"InferenceService {name}: deployment mode {mode!r} is not known")


def service_url(services: InferenceServices, name: str) -> str:
    """Where the stable service answers."""
    return _url(_existing(services, name))


def _existing(services: InferenceServices, name: str) -> Json:
    service = services.get(name)
    if service is None:
        raise InputError(
            f"there is no InferenceService {services.namespace}/{name}: apply k8s/ first"
        )
    return service


def _not_ready(service: Json) -> str:
    status = service.get("status", {})
    if status.get("observedGeneration", 0) < service["metadata"].get("generation", 0):
        return "KServe has not looked at it yet"
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    ready = conditions.get("Ready")
    if ready is None:
        return "it has no status yet"
    if ready["status"] != "True":
        waiting = [
            f"{name}: {c.get('message') or c.get('reason') or c['status']}"
            for name, c in conditions.items()
            if c["status"] != "True"
        ]
        return "; ".join(waiting)
    return ""


def _url(service: Json) -> str:
    url = service.get("status", {}).get("url")
    if not url:
        raise UnavailableError(f"InferenceService {service['metadata']['name']} has no address yet")
    return str(url).rstrip("/")


def _variable(part: Json, name: str) -> str | None:
    for variable in part["containers"][0].get("env", []):
        if variable["name"] == name:
            return str(variable.get("value", ""))
    return None


def _with_variable(part: Json, name: str, value: str | None) -> list[Json]:
    """The containers with a variable of the first set (None: left out)."""
    containers = copy.deepcopy(part["containers"])
    kept = [v for v in containers[0].get("env", []) if v["name"] != name]
    containers[0]["env"] = [*kept, *([{"name": name, "value": value}] if value is not None else [])]
    return containers
