"""The main job run once for all end-to-end tests: a generated log, deployed and served."""

import json

import pytest

from pipelines.serving import local_serving
from serving.client import Client
from tests import synthetic
from tests.planted import FAST, ITEMS, hrnn_run, write_log


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    log = synthetic.successor(300, 12, ITEMS, seed=0)
    path = write_log(workspace / "log.csv", log)
    done = hrnn_run(
        workspace,
        "--interactions",
        path,
        settings=FAST
        | {"ingest.columns": "{user_id: customer, item_id: product_id, timestamp: when}"},
    )
    assert done.returncode == 0, done.stderr
    return workspace, json.loads(done.stdout), done, path


@pytest.fixture(scope="session")
def service(deployed):
    with local_serving(deployed[0]) as serving, Client(serving.url) as client:
        yield serving, client
