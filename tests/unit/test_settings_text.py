"""Settings as text: the code's own comments, and the values that come back when it is read."""

from pathlib import Path
from typing import Literal

import yaml

from model.settings import SettingsBase
from pipelines.settings import load
from pipelines.settings_text import to_page, to_yaml

DOCS = Path(__file__).parents[2] / "docs"


class Base(SettingsBase):
    """Something."""

    a: int = 1  # beside
    # above,
    # in two lines
    b: str = "x"
    c: dict[str, int] = {
        "one": 1,  # inside
    }


class Derived(Base):
    """More."""

    # not of d

    def method(self) -> int:
        x: int = 3  # of no field
        return x

    b: str = "y"  # said anew
    d: Literal["p", "q"] = "p"


def test_comments_are_those_of_the_source():
    assert Base.comments() == {"a": "beside", "b": "above, in two lines", "c": "inside"}
    assert Derived.comments() == {"a": "beside", "b": "said anew", "c": "inside", "d": ""}


def test_the_text_reads_back_as_the_same_settings(tmp_path):
    chosen = load(
        None, ["train.seed=5", "ingest.columns={user_id: 'a: # b'}", "train.softmax=dense"]
    )
    text = to_yaml(chosen)
    assert yaml.safe_load(text) == chosen.to_json()
    file = tmp_path / "all.yaml"
    file.write_text(text)
    assert load(file) == chosen
    assert "one of auto, dense, sampled" in text
    assert all(len(line) <= 100 for line in text.split("\n") if "query" not in line)


def test_the_page_in_the_docs_is_what_the_source_says():
    assert (DOCS / "settings.md").read_text() == to_page(), "run `make golden`, review it"
