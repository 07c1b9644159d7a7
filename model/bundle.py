"""The bundle: what training hands to serving. A folder of safetensors, JSON and Parquet.

Nothing in it can execute; every file is listed in `manifest.json` with its SHA-256, and loading
verifies the digests before anything is read.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.catalogue import Catalogue
from model.errors import BundleError, InputError
from model.fields import FieldBags
from model.hrnn import TrainedHRNN
from model.inputs import InputEncodings
from model.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    digest_of_file,
    verify,
)
from model.network import HRNNMeta
from model.schema import Schema
from model.training import TrainSettings
from model.transitions import Transitions
from model.trends import ResolvedTrend, TrendSnapshot

TRANSITIONS = "transitions.safetensors"
# What reading raises where something else was written than `save` writes.
UNREADABLE = KeyError, ValueError, TypeError, OverflowError, RuntimeError, OSError, SafetensorError


@dataclass(frozen=True)
class Bundle:
    """Everything in a bundle, loaded and checked."""

    manifest: Manifest
    model: TrainedHRNN
    catalogue: Catalogue
    schema: Schema
    settings: TrainSettings
    trend: TrendSnapshot
    metrics: dict[str, Any]


def save(
    path: Path,
    *,
    model: TrainedHRNN,
    catalogue: Catalogue,
    schema: Schema,
    settings: TrainSettings,
    trend: TrendSnapshot,
    metrics: dict[str, Any],
) -> Manifest:
    """Write a bundle; `path` appears complete or not at all.

    Raises:
        BundleError: `path` already holds something, or the model is not complete.
    """
    if path.exists() and any(path.iterdir()):
        raise BundleError(f"{path} is not empty: a bundle is never written over another")
    if (model.network.prior is None) != (model.transitions is None):
        raise BundleError("the network's transition prior and the counts belong together")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        weights = {n: t.contiguous() for n, t in model.network.state_dict().items()}
        save_file(weights, work / "weights.safetensors")
        if model.transitions is not None:
            save_file(model.transitions.tensors(), work / TRANSITIONS)
        catalogue.save(work / "items.parquet")
        _write_json(work / "schema.json", schema.model_dump(mode="json"))
        _write_json(work / "trend.json", trend.to_json())
        _write_json(work / "metrics.json", metrics)
        _write_json(
            work / "settings.json",
            {
                "train": settings.model_dump(mode="json"),
                "encodings": model.encodings.model_dump(mode="json"),
                "trend": None if model.trend is None else asdict(model.trend),
            },
        )
        files = {f.name: digest_of_file(f) for f in sorted(work.iterdir())}
        created = datetime.now(UTC)
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
        version = f"{created:%Y%m%dT%H%M%SZ}-{digest}"
        card = _model_card(version, model, catalogue, metrics)
        (work / "MODEL_CARD.md").write_text(card)
        files["MODEL_CARD.md"] = digest_of_file(work / "MODEL_CARD.md")
        manifest = Manifest(FORMAT, FORMAT_VERSION, version, created.isoformat(), files)
        _write_json(work / MANIFEST, asdict(manifest))
        work.chmod(0o755)
        if path.exists():
            path.rmdir()
        work.replace(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def load(path: Path) -> Bundle:
    """Verify and load.

    Raises:
        BundleError: the bundle is missing, corrupt, foreign, or its parts do not fit together.
    """
    manifest = verify(path)
    try:
        schema = Schema.load(path / "schema.json")
        stored = json.loads((path / "settings.json").read_text())
        settings = TrainSettings.parse(stored["train"])
        trend = None if stored["trend"] is None else ResolvedTrend(**stored["trend"])
        catalogue = Catalogue.load(path / "items.parquet", schema.item_title)
        encodings = InputEncodings.parse(stored["encodings"], "encodings")
        if encodings.num_items != len(catalogue):
            raise BundleError(
                f"{path}: items.parquet holds {len(catalogue)} items, the model knows "
                f"{encodings.num_items}"
            )
        item_bags = FieldBags.encode(encodings.item_fields, catalogue.fields, len(catalogue))
        network = HRNNMeta(settings.network, encodings, item_bags, with_trend=trend is not None)
        weights = load_file(path / "weights.safetensors")
        if manifest.format_version == 5:
            fresh = network.state_dict()  # what is not there yet changes nothing as it begins
            weights |= {n: fresh[n] for n in ("new_beta", "new_share", "items.new_bias")}
        network.load_state_dict(weights)
        network.eval()
        transitions = None
        if network.prior is not None:
            transitions = Transitions.from_tensors(load_file(path / TRANSITIONS), len(catalogue))
        for name, tensor in network.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise BundleError(f"{path}: weight {name} is not finite")
        snapshot = TrendSnapshot.from_json(json.loads((path / "trend.json").read_text()))
        metrics = json.loads((path / "metrics.json").read_text())
    except UNREADABLE as error:
        raise BundleError(f"{path} cannot be loaded: {error}") from error
    except InputError as error:
        raise BundleError(f"{path} was written with other settings: {error}") from error
    model = TrainedHRNN(network, encodings, trend, transitions)
    return Bundle(manifest, model, catalogue, schema, settings, snapshot, metrics)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _model_card(
    version: str,
    model: TrainedHRNN,
    catalogue: Catalogue,
    metrics: dict[str, Any],
) -> str:
    parameters = sum(p.numel() for p in model.network.parameters())
    rows = [
        ("Model", f"HRNN-meta, {model.network.settings.encoder.value} encoder, softmax over items"),
        ("Version", version),
        ("Items", f"{len(catalogue):,}"),
        ("Parameters", f"{parameters:,}"),
        ("Session gap", f"{model.encodings.session_gap:,} s"),
        ("Trend weight β", model.network.describe_beta()),
        ("Trend", "none" if model.trend is None else str(asdict(model.trend))),
        ("Item fields", ", ".join(f.name for f in model.encodings.item_fields) or "none"),
        ("User fields", ", ".join(f.name for f in model.encodings.user_fields) or "none"),
        ("Context fields", ", ".join(f.name for f in model.encodings.context_fields) or "none"),
        ("Feedback", _feedback(model)),
        *((f"Training {name}", value) for name, value in metrics.get("training", {}).items()),
    ]
    lines = ["# Model card", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]
    lines += [
        "Scores are unnormalised log-probabilities of the next interaction, learned from what",
        "people did, not from what was good for them: popular and often shown items are favoured",
        "as far as the trend decomposition does not account for them.",
        "",
    ]
    return "\n".join(lines)


def _feedback(model: TrainedHRNN) -> str:
    read = [] if model.encodings.event_type is None else ["event type"]
    if model.encodings.value_mean is not None:
        read.append(f"value (mean {model.encodings.value_mean:.3g})")
    return ", ".join(read) or "none"
