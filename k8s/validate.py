"""Checks rendered manifests offline: `python -m k8s.validate k8s/overlays/example`.

Core resources against the Kubernetes schemas (kubernetes-validate, strict); the InferenceService
against KServe's own SDK model, field by field and type by type; Kubeflow Trainer's against its
SDK's; the Prometheus operator's resources by shape. kubectl's dry run needs an API server, this
does not.
"""

import copy
import re
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

KUBERNETES_VERSION = "1.32"  # what KServe 0.21 asks for
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class RenderError(Exception):
    """kubectl kustomize refused the folder."""


def render(folder: Path) -> list[dict[str, Any]]:
    """Documents that `kubectl kustomize` makes of a folder."""
    if shutil.which("kubectl") is None:
        raise RenderError("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise RenderError(done.stderr.strip())
    return [d for d in yaml.safe_load_all(done.stdout) if d]


def problems(documents: list[dict[str, Any]]) -> list[str]:
    """Everything that is wrong with the documents; empty when nothing is."""
    found = []
    for document in documents:
        kind, name = document.get("kind", "?"), document.get("metadata", {}).get("name", "?")
        place = f"{kind}/{name}"
        if not DNS_NAME.fullmatch(str(name)):
            found.append(f"{place}: metadata.name is not a DNS name")
        group = str(document.get("apiVersion", "")).split("/")[0]
        if kind == "InferenceService":
            found += [f"{place}: {p}" for p in _inference_service(document)]
        elif group == "trainer.kubeflow.org":
            found += [f"{place}: {p}" for p in _training(document)]
        elif group == "monitoring.coreos.com":
            found += [f"{place}: {p}" for p in _monitoring(document)]
        else:
            found += [f"{place}: {p}" for p in _core(document)]
    return found


def _core(document: dict[str, Any]) -> list[str]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(map(str, error.path))
        return [f"{path}: {error.message}"]
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as e:
        return [f"no schema for {document.get('apiVersion')} {document.get('kind')}: {e}"]
    return []


def _training(document: dict[str, Any]) -> list[str]:
    """Kubeflow Trainer's resources: its SDK's model, and nothing that the model does not know."""
    import kubeflow_trainer_api.models as models
    import pydantic

    model = getattr(models, f"TrainerV1alpha1{document.get('kind')}", None)
    if model is None:
        return [f"no schema for {document.get('apiVersion')} {document.get('kind')}"]
    filled = copy.deepcopy(document)
    try:
        known = model.model_validate(filled)
    except pydantic.ValidationError as error:
        problems = error.errors()
        for problem in problems:
            if "ResourceQuantity" not in problem["msg"] or not isinstance(problem["input"], str):
                return [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems]
            # The SDK's model of a quantity takes no plain string from a document.
            *path, last = problem["loc"]
            place = reduce(lambda value, key: value[key], path, filled)
            place[last] = models.IoK8sApimachineryPkgApiResourceQuantity(problem["input"])
        known = model.model_validate(filled)
    return _unknown(document, known.model_dump(by_alias=True, exclude_none=True), "")


def _unknown(value: Any, known: Any, path: str) -> list[str]:
    """Fields that a model dropped."""
    if isinstance(value, dict) and isinstance(known, dict):
        found = [f"{path}.{k}: no such field".lstrip(".") for k in value.keys() - known.keys()]
        return found + [
            p
            for k in value.keys() & known.keys()
            for p in _unknown(value[k], known[k], f"{path}.{k}")
        ]
    if isinstance(value, list) and isinstance(known, list):
        pairs = enumerate(zip(value, known, strict=True))
        return [p for i, (v, k) in pairs for p in _unknown(v, k, f"{path}[{i}]")]
    return []


def _inference_service(document: dict[str, Any]) -> list[str]:
    import kserve

    found = _walk(document, kserve.V1beta1InferenceService, "", [kserve])
    if not document.get("spec", {}).get("predictor"):
        found.append("spec.predictor: missing")
    return found


_PRIMITIVES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def _walk(value: Any, model: Any, path: str, modules: list[Any]) -> list[str]:
    """Compare a document with an SDK model: openapi_types says types, attribute_map names."""
    if not isinstance(value, dict):
        return [f"{path}: expected an object, got {value!r}"]
    attributes = {wire: attribute for attribute, wire in model.attribute_map.items()}
    found = []
    for key, inner in value.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in attributes:
            found.append(f"{here}: no such field")
            continue
        found += _check(inner, model.openapi_types[attributes[key]], here, modules)
    return found


def _check(value: Any, type_name: str, path: str, modules: list[Any]) -> list[str]:
    if value is None:
        return []
    if listed := re.fullmatch(r"list\[(.+)\]", type_name):
        if not isinstance(value, list):
            return [f"{path}: expected a list, got {value!r}"]
        return [
            p for i, v in enumerate(value) for p in _check(v, listed[1], f"{path}[{i}]", modules)
        ]
    if mapped := re.fullmatch(r"dict\(str, (.+)\)", type_name):
        if not isinstance(value, dict):
            return [f"{path}: expected an object, got {value!r}"]
        return [p for k, v in value.items() for p in _check(v, mapped[1], f"{path}.{k}", modules)]
    if type_name in _PRIMITIVES:
        fits = isinstance(value, _PRIMITIVES[type_name])
        if type_name != "bool" and isinstance(value, bool):
            fits = False
        return [] if fits else [f"{path}: expected {type_name}, got {value!r}"]
    model = _model(type_name, modules)
    # Types that the SDK leaves open (quantities, int-or-string, object) have no model to walk.
    return [] if model is None else _walk(value, model, path, modules)


def _model(type_name: str, modules: list[Any]) -> Any:
    from kubernetes import client

    for module in (*modules, client):
        model = getattr(module, type_name, None)
        if model is not None and hasattr(model, "openapi_types"):
            return model
    return None


def _monitoring(document: dict[str, Any]) -> list[str]:
    spec = document.get("spec", {})
    if document["kind"] == "PodMonitor":
        endpoints = spec.get("podMetricsEndpoints")
        if not spec.get("selector") or not endpoints or not all("port" in e for e in endpoints):
            return ["needs a selector and endpoints with a port"]
        return []
    if document["kind"] == "PrometheusRule":
        found = []
        for group in spec.get("groups") or [{}]:
            if not group.get("name") or not group.get("rules"):
                found.append("every group needs a name and rules")
            for rule in group.get("rules", []):
                if unknown := rule.keys() - {"alert", "expr", "for", "labels", "annotations"}:
                    found.append(f"{rule.get('alert')}: unknown {sorted(unknown)}")
                if not rule.get("expr"):
                    found.append(f"{rule.get('alert')}: no expr")
        return found
    return [f"unexpected kind {document['kind']}"]


def main(arguments: list[str]) -> int:
    """Exit code 0 when every folder renders and nothing is wrong."""
    code = 0
    for folder in arguments or ["k8s/base", "k8s/overlays/example"]:
        try:
            documents = render(Path(folder))
            found = problems(documents)
        except RenderError as error:
            documents, found = [], [str(error)]
        for problem in found:
            print(f"{folder}: {problem}")
        if found:
            code = 1
        else:
            print(f"{folder}: {len(documents)} resources, all valid")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
