"""Every wrong request is refused with a reason that names the field."""

import pytest

from model.errors import InputError
from model.query import Event
from serving.schemas import parse_instances, parse_score_instances
from serving.settings import ServeSettings
from tests.fuzzing import nested

SETTINGS = ServeSettings(max_history=5, max_items=4, max_instances=3, max_num_results=50)


def parse(**values):
    return parse_instances([values], SETTINGS)[0]


@pytest.mark.parametrize(
    "item_filter",
    [
        {"include": ["a", "b"], "exclude": ["a"]},  # b is left
        {"exclude": []},
        {"include": None, "exclude": ["a"], "where": {}},
        {"where": {"genres": ["no film has it"]}},  # today
    ],
)
def test_a_filter_that_an_item_could_pass_is_taken(item_filter):
    assert parse(filter=item_filter).filter.exclude == item_filter.get("exclude", [])


def test_an_empty_instance_is_a_new_user_now():
    instance = parse()
    assert (instance.task, instance.user_id, instance.history, instance.timestamp) == (
        "recommend", None, None, None,
    )  # fmt: skip
    assert (instance.trend_weight, instance.exclude_seen) == (1.0, False)


def test_every_field_is_read():
    instance = parse(
        user_id="196",
        user={"age": 49, "gender": "M", "tags": ["a", "b"], "none": None},
        history=[{"item_id": "242", "timestamp": 881250949, "event_type": "rating", "value": 3.0}],
        timestamp=893286638,
        context={"device": "tv"},
        task="rank",
        items=["1", "2"],
        num_results=2,
        exclude_seen=True,
        filter={"include": ["1"], "exclude": ["2"], "where": {"genres": ["Comedy"]}},
        trend_weight=0.5,
        exploration_weight=0.0,
    )
    assert instance.user == {"age": 49.0, "gender": "M", "tags": ("a", "b"), "none": None}
    assert instance.filter.to_filter().where == {"genres": frozenset({"Comedy"})}
    assert instance.filter.to_filter().include == {"1"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_results": 0}, "instances[0].num_results"),
        ({"num_results": -5}, "instances[0].num_results"),
        ({"num_results": 2.5}, "instances[0].num_results"),
        ({"num_results": "3"}, "instances[0].num_results"),
        ({"num_results": True}, "instances[0].num_results"),
        ({"num_results": 10**9}, "must be at most 50"),
        ({"timestamp": -1}, "instances[0].timestamp: must not be negative"),
        ({"timestamp": float("nan")}, "instances[0].timestamp"),
        ({"timestamp": float("inf")}, "instances[0].timestamp"),
        ({"timestamp": 1_700_000_000_000}, "not milliseconds"),
        ({"timestamp": "2020-01-01"}, "instances[0].timestamp"),
        ({"user_id": 196}, "instances[0].user_id: Input should be a valid string"),
        ({"user_id": ""}, "instances[0].user_id"),
        ({"user_id": "x" * 513}, "instances[0].user_id"),
        ({"user": {"age": float("nan")}}, "instances[0].user.age"),
        ({"user": {"age": {"years": 3}}}, "instances[0].user.age"),
        ({"user": {"vip": True}}, "instances[0].user.vip"),
        ({"user": [1]}, "instances[0].user"),
        ({"context": {"device": [1]}}, "instances[0].context.device"),
        ({"context": {"device": True}}, "instances[0].context.device"),
        ({"context": "tv"}, "instances[0].context"),
        ({"task": "guess"}, "task: is not supported (supported: recommend, rank, rate)"),
        ({"task": None}, "instances[0].task"),
        ({"task": "rank"}, "instances[0].items: task 'rank' needs"),
        ({"task": "rank", "items": []}, "instances[0].items: task 'rank' needs"),
        ({"task": "rank", "items": ["a", 1]}, "instances[0].items[1]"),
        ({"task": "rank", "items": ["a"] * 5}, "instances[0].items: at most 4"),
        ({"task": "rate"}, "instances[0].items: task 'rate' needs a list of item ids to rate"),
        ({"task": "rate", "items": ["a"] * 5}, "instances[0].items: at most 4"),
        ({"items": ["a"]}, "instances[0].items: only tasks 'rank' and 'rate' take items"),
        ({"history": [{"item_id": "a"}]}, "history[0].timestamp: is required"),
        ({"history": [{"timestamp": 5}]}, "history[0].item_id: is required"),
        ({"history": [{"item_id": "a", "timestamp": -5}]}, "history[0].timestamp: must not"),
        ({"history": "a"}, "instances[0].history"),
        ({"history": [{"item_id": "a", "timestamp": 5, "value": "4"}]}, "history[0].value"),
        ({"history": [{"item_id": "a", "timestamp": 5, "event_type": 4}]}, "history[0].event_type"),
        ({"history": [{"item_id": "a", "timestamp": 5}] * 6}, "history: at most 5"),
        ({"history": [{"item_id": "a", "timestamp": 5, "x": 1}]}, "history[0].x: no such field"),
        ({"filter": {"include": "a"}}, "instances[0].filter.include"),
        ({"filter": {"exclude": ["a"] * 5}}, "instances[0].filter.exclude: at most 4"),
        ({"filter": {"where": {"genres": "Comedy"}}}, "filter.where.genres"),
        ({"filter": {"where": {"genres": ["x"] * 5}}}, "filter.where: at most 4"),
        ({"filter": {"only": []}}, "filter.only: no such field"),
        ({"filter": {"include": []}}, "instances[0].filter.include: must not be empty"),
        ({"filter": {"where": {"genres": []}}}, "filter.where.genres: must not be empty"),
        (
            {"filter": {"include": ["a", "b"], "exclude": ["b", "c", "a"]}},
            "instances[0].filter: contradicts itself: every item of include is in exclude too",
        ),
        (
            {"task": "rate", "items": ["a"], "filter": {"include": ["a"], "exclude": ["a"]}},
            "instances[0].filter: contradicts itself",
        ),
        ({"trend_weight": -1}, "instances[0].trend_weight"),
        ({"trend_weight": float("inf")}, "instances[0].trend_weight"),
        ({"exploration_weight": -0.3}, "greater than or equal to 0"),
        ({"exploration_weight": 101}, "less than or equal to 100"),
        ({"numresults": 3}, "instances[0].numresults: no such field (known: user_id"),
        ({"x" * 10**6: 3}, "no such field"),
        ({"user_id": nested(6, 4, "x" * 30)}, "user_id: Input should be a valid string (got {"),
        ({"user_id": [[nested(6, 4, "🎬" * 30)] * 6] * 6}, "instances[0].user_id"),
        ({"user": {f"f{i}": nested(6, 4, "Ж" * 30) for i in range(9)}}, "and 4 more problems"),
        ({"history": [nested(6, 4, "x" * 30)] * 5}, "more problems"),
        ({"context": {"🎬" * 80 + str(i): nested(6, 4, "🎬" * 30) for i in range(9)}}, "context"),
        ({"filter": {"include": [nested(6, 3, "x" * 30)] * 4}}, "instances[0].filter.include[3]"),
        ({"filter": {"where": {"🎬" * 500: nested(6, 3, "x" * 30)}}}, "instances[0].filter.where"),
    ],
)
def test_refused(values, expected):
    with pytest.raises(InputError) as error:
        parse(**values)
    assert expected in str(error.value)
    assert len(str(error.value).encode()) <= 2000


@pytest.mark.parametrize(
    "instances",
    [[], [{}] * 4, [5], [None], [[]], [{"num_results": -1}, {}], [[nested(6, 4, "x")] * 9]],
)
def test_refused_lists(instances):
    with pytest.raises(InputError, match="instances") as error:
        parse_instances(instances, SETTINGS)
    assert len(str(error.value)) < 400


def test_results_of_a_whole_request_are_limited():
    settings = ServeSettings(max_total_results=30)
    with pytest.raises(InputError, match="num_results add up to 50"):
        parse_instances([{}, {}], settings)


def test_many_problems_are_summed_up():
    with pytest.raises(InputError, match="and 5 more problems"):
        parse(**{f"x{i}": 1 for i in range(10)})


def test_whole_numbers_stay_whole():
    """A categorical field may hold "5", and 5 reads as that; 5.0 would not."""
    values = parse(user={"zip": 5}, context={"ratio": 0.5, "level": 3.0})
    assert [str(v) for v in (values.user["zip"], *values.context.values())] == ["5", "0.5", "3.0"]


def test_the_query_holds_events_in_order_of_time():
    event = {"item_id": "b", "timestamp": 7, "event_type": "play", "value": 4}
    (instance,) = parse_score_instances(
        [
            {
                "history": [event, {"item_id": "a", "timestamp": 3.5}],
                "timestamp": 9,
                "user": {"age": 3},
                "context": {"device": "tv"},
                "top_n": 5,
                "exclude_seen": True,
            }
        ],
        SETTINGS,
    )
    query = instance.to_asked().query
    assert list(query.history) == [Event("a", 3.5), Event("b", 7.0, "play", 4.0)]
    assert query.context == {"device": "tv"}
    assert (query.timestamp, query.user, query.exclude_seen) == (9.0, {"age": 3.0}, True)


@pytest.mark.parametrize(
    "values",
    [
        {"top_n": 5},
        {"timestamp": 3},
        {"timestamp": 3, "top_n": -1},
        {"timestamp": 3, "top_n": 5, "task": "rank"},
    ],
)
def test_the_predictor_refuses_too(values):
    with pytest.raises(InputError, match=r"instances\[0\]\."):
        parse_score_instances([values], SETTINGS)


def test_settings_come_from_the_environment_and_back():
    settings = ServeSettings(predictor_http_port=9000, redis_url="redis://r:6379", model_dir="/m")
    assert ServeSettings.from_env(settings.to_env()) == settings
    assert ServeSettings.from_env({}) == ServeSettings()
    with pytest.raises(InputError, match="HRNN_PREDICTOR_HTTP_PORT"):
        ServeSettings.from_env({"HRNN_PREDICTOR_HTTP_PORT": "eighty"})


def test_the_predictor_address_gets_the_grpc_port_unless_it_has_one():
    assert ServeSettings().predictor_address == "127.0.0.1:8091"
    assert ServeSettings(predictor_host="p.ns").predictor_address == "p.ns:8091"
    assert ServeSettings(predictor_host="p.ns:81").predictor_address == "p.ns:81"
