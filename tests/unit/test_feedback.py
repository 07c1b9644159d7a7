"""Weights and rewards by event type and value, and settings that make no sense."""

import numpy as np
import pytest

from model.errors import InputError
from model.feedback import FeedbackSettings, event_rewards, event_weights, event_worth
from tests import synthetic

TYPES = np.array(["click", "view", None, "buy"], dtype=object)
VALUES = np.array([1.0, 3.0, np.nan, 9.0])


def test_by_default_all_events_are_equal():
    settings = FeedbackSettings()
    for types, values in ((None, None), (TYPES, VALUES)):
        weight_E = event_weights(settings, 4, types, None)
        reward_E = event_rewards(settings, 4, types, values)
        assert weight_E.dtype == reward_E.dtype == np.float32
        assert weight_E.tolist() == reward_E.tolist() == [1, 1, 1, 1]
    assert not settings.has_rewards


def test_tables_by_type_leave_other_types_at_one():
    settings = FeedbackSettings.parse(
        {"weights": {"buy": 5, "view": 0}, "rewards": {"view": 0.25, "click": 0}}
    )
    assert event_weights(settings, 4, TYPES, None).tolist() == [1, 0, 1, 5]
    assert event_rewards(settings, 4, TYPES, None).tolist() == [0, 0.25, 1, 1]
    assert settings.has_rewards
    assert not FeedbackSettings(weights={"buy": 5}, rewards={"buy": 1}).has_rewards


def test_values_become_rewards_linearly_and_clipped():
    settings = FeedbackSettings.parse({"reward_from_value": [1, 5]})
    assert event_rewards(settings, 4, None, VALUES).tolist() == [0, 0.5, 1, 1]
    falling = FeedbackSettings.parse({"reward_from_value": [5, 1]})
    assert event_rewards(falling, 4, None, VALUES).tolist() == [1, 0.5, 1, 0]
    assert settings.has_rewards


def test_type_and_value_multiply():
    settings = FeedbackSettings.parse({"rewards": {"view": 0.5}, "reward_from_value": [1, 5]})
    assert event_rewards(settings, 4, TYPES, VALUES).tolist() == [0, 0.25, 1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rewards": {"view": 1.5}}, r"feedback\.rewards\.view.*less than or equal to 1"),
        ({"rewards": {"view": -0.1}}, r"feedback\.rewards\.view.*greater than or equal to 0"),
        ({"rewards": {"view": float("nan")}}, r"feedback\.rewards\.view"),
        ({"weights": {"view": -1}}, r"feedback\.weights\.view.*greater than or equal to 0"),
        ({"weights": {"view": float("inf")}}, r"feedback\.weights\.view.*finite"),
        ({"weights": {"view": float("nan")}}, r"feedback\.weights\.view.*finite"),
        ({"reward_from_value": [3, 3]}, r"feedback\.reward_from_value.*must differ"),
        ({"reward_from_value": [0, float("inf")]}, r"feedback\.reward_from_value.*finite"),
        ({"reward_from_value": [1]}, r"feedback\.reward_from_value"),
        ({"reward": {}}, r"feedback\.reward: no such setting"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        FeedbackSettings.parse(values, "feedback")


def test_settings_that_the_log_cannot_serve_are_refused():
    by_type = FeedbackSettings.parse({"weights": {"buy": 2}, "rewards": {"view": 0}})
    with pytest.raises(InputError, match=r"feedback\.weights.*event_type"):
        event_weights(by_type, 4, None, None)
    with pytest.raises(InputError, match=r"feedback\.rewards.*event_type"):
        event_rewards(by_type, 4, None, VALUES)
    with pytest.raises(InputError, match="event_value"):
        event_rewards(FeedbackSettings.parse({"reward_from_value": [0, 1]}), 4, TYPES, None)
    nothing = FeedbackSettings.parse({"weights": {"buy": 0}})
    with pytest.raises(InputError, match="every event has weight 0"):
        event_weights(nothing, 2, np.array(["buy", "buy"], dtype=object), None)
    assert event_weights(nothing, 0, np.array([], dtype=object), None).shape == (0,)


def test_weights_by_value_multiply_those_by_type():
    settings = FeedbackSettings(weights={"buy": 5.0}, weight_from_value=(1.0, 5.0))
    value = np.array([1.0, 3.0, np.nan, 9.0])
    types = np.array(["buy", "buy", "buy", "view"], dtype=object)
    assert event_weights(settings, 4, types, value).tolist() == [0, 2.5, 5, 1]
    with pytest.raises(InputError, match=r"feedback\.weight_from_value needs event values"):
        event_weights(settings, 4, types, None)


def test_an_event_type_that_the_log_does_not_have_is_refused():
    settings = FeedbackSettings(weights={"purchase": 5.0})
    types = np.array(["buy", "view", None], dtype=object)
    with pytest.raises(InputError, match=r"feedback\.weights\.purchase: .*\(it has: buy, view\)"):
        event_weights(settings, 3, types, None)


def test_worth_of_held_out_events_is_weight_times_reward():
    settings = FeedbackSettings.parse(
        {
            "weights": {"buy": 5, "gift": 2},  # nobody among the held-out users gave one
            "rewards": {"view": 0.25, "skip": 0},
            "reward_from_value": [1, 5],
        }
    )
    log = synthetic.histories([[0, 1], [2, 3]], [[0, 1], [0, 1]])
    log = synthetic.replace(log, event_type_E=TYPES, value_E=VALUES)
    assert event_worth(settings, log).tolist() == [0, 0.125, 1, 5]
    plain = synthetic.histories([[0, 1]], [[0, 1]])
    assert event_worth(FeedbackSettings(), plain).tolist() == [1, 1]
