"""Command-line words become the request that was meant."""

import io

import pytest

from model.errors import InputError
from model.query import Recommendation
from pipelines import questions
from pipelines.tables import recommendation_table
from serving.client import Prediction, Rating
from serving.schemas import parse_instances
from serving.settings import ServeSettings


def test_words_make_a_valid_request():
    instance = {
        "task": "rank",
        "items": questions.items(["50,181", "7"]),
        "history": questions.history(["a@b", "i1@881250949", "i2"], 1000.0),
        "context": questions.fields("--context", ["device=tv", "volume=2.5", "n=7", "t=a=b"]),
        "filter": questions.item_filter(["genres=Comedy", "genres=Drama", "year=1995"]),
    }
    (parsed,) = parse_instances([instance], ServeSettings())
    assert parsed.items == ["50", "181", "7"]
    assert [(e.item_id, e.timestamp) for e in parsed.history] == [
        ("a@b", 820.0),
        ("i1", 881250949.0),
        ("i2", 940.0),
    ]
    assert parsed.context == {"device": "tv", "volume": 2.5, "n": 7, "t": "a=b"}
    assert parsed.filter.where == {"genres": ["Comedy", "Drama"], "year": ["1995"]}
    assert questions.items(None) is questions.history(None, 0) is questions.item_filter([]) is None


@pytest.mark.parametrize("text", ["device", "=tv", ""])
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(InputError, match=r"--context .*NAME=VALUE"):
        questions.fields("--context", [text])


def test_the_table_shows_what_the_task_answers():
    def shown(**values):
        stream = io.StringIO()
        rest = {"model_version": "v", "trend_version": None, "degraded": ()}
        recommendation_table(Prediction("r", **rest, **values), {"a": "Alien"}, stream)
        return stream.getvalue()

    plain = shown(items=(Recommendation("a", -1.0, -0.5, -0.5),))
    assert "Alien" in plain and "affinity" in plain and "exploration" not in plain
    assert "0.250" in shown(items=(Recommendation("a", -0.75, -0.5, -0.5, 0.25),))
    rated = shown(items=(), ratings=(Rating("a", 4.2),), unknown_items=2)
    assert "4.200" in rated and "affinity" not in rated and "2 items" in rated
