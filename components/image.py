"""The container image that pipeline steps run in."""

import os

IMAGE: str = os.environ.get("HRNN_IMAGE", "hrnn-meta/python-pipeline:0.1.0")
