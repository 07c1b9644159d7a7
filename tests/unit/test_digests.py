"""The code a run was submitted for and the code in the image of its steps are the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import digests
from components.digests import check_code, code_digest
from model.errors import InputError

ROOT = Path(digests.__file__).parents[1]
IN_IMAGE = ("pyproject.toml", "README.md", "LICENSE", *digests.ROOMS, "serving", "pipelines")


def _run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("HRNN_CODE_DIGEST",)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment | {"PYTHONPATH": str(cwd)},
    )


def test_a_step_refuses_a_run_that_is_for_other_code(monkeypatch):
    check_code(code_digest())
    for other in ("0123456789ab", ""):
        with pytest.raises(InputError, match=f"would run {code_digest()}. In a cluster: build"):
            check_code(other)
    code_digest.cache_clear()
    try:
        monkeypatch.setenv("HRNN_CODE_DIGEST", "of-the-image")
        check_code("of-the-image")
    finally:
        code_digest.cache_clear()


def test_the_digest_changes_with_every_source_file_of_the_steps(tmp_path):
    for room in digests.ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    first = _run("-m", "components.digests", cwd=tmp_path).stdout.strip()
    assert len(first) == 12
    for name in ("components/gate/rules.yaml", "model/losses.py"):
        with (tmp_path / name).open("a") as f:
            f.write("\n")
        changed = _run("-m", "components.digests", cwd=tmp_path).stdout.strip()
        assert changed != first
        refused = _run("-m", "components.digests", first, cwd=tmp_path)
        assert refused.returncode == 1
        assert f"expected {first}" in refused.stderr
        first = changed


def test_what_an_image_installs_has_the_digest_of_its_source(tmp_path):
    """As the Dockerfile does it: copy, install, compare."""
    source, installed = tmp_path / "app", tmp_path / "site"
    source.mkdir()
    for name in IN_IMAGE:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source / name)
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    done = _run(*pip, "--no-compile", "--target", str(installed), str(source), cwd=source)
    assert done.returncode == 0, done.stderr
    checked = _run("-m", "components.digests", cwd=installed)
    expected = _run("-m", "components.digests", cwd=ROOT).stdout
    assert (checked.stdout, checked.returncode) == (expected, 0)


def test_the_image_is_built_with_what_the_digest_covers():
    dockerfile = (ROOT / "k8s" / "images" / "pipeline.Dockerfile").read_text()
    for room in digests.ROOMS:
        assert f"COPY {room} {room}" in dockerfile
    assert "python -m components.digests ${CODE_DIGEST}" in dockerfile
