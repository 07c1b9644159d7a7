"""What an event is worth: loss weights and rewards by event type and value (§3.3).

Shapes: E events.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, field_validator

from model.errors import InputError
from model.sequences import Histories
from model.settings import SettingsBase

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Reward = Annotated[float, Field(ge=0.0, le=1.0)]


class FeedbackSettings(SettingsBase):
    """How events differ in what they teach; by default they do not."""

    weights: dict[str, Weight] = {}  # loss weight by event type; 1 for all others
    rewards: dict[str, Reward] = {}  # reward r by event type; 1 for all others
    # The values (e.g. ratings) that mean reward 0 and reward 1, or weight 0 and weight 1; linear
    # between, clipped outside.
    reward_from_value: tuple[FiniteFloat, FiniteFloat] | None = None
    weight_from_value: tuple[FiniteFloat, FiniteFloat] | None = None

    # Weight of the softmax over the list an item was chosen from, beside the one over all items;
    # 0: what was shown and not chosen is not read.
    shown_weight: Weight = 0.3
    shown_items: Annotated[int, Field(ge=1)] = 50  # of a list that are read, those shown first

    @field_validator("reward_from_value", "weight_from_value")
    @classmethod
    def _two_values(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] == ends[1]:
            raise ValueError("the values that mean 0 and 1 must differ")
        return ends

    @property
    def lists(self) -> int:
        """How many of the items that were shown with an event's are read."""
        return self.shown_items if self.shown_weight else 0

    @property
    def has_rewards(self) -> bool:
        """Whether any event can have a reward other than 1: then `one_against_all` is needed."""
        return self.reward_from_value is not None or any(r < 1.0 for r in self.rewards.values())


def event_weights(
    settings: FeedbackSettings,
    num_events: int,
    event_type_E: NDArray[np.object_] | None,
    value_E: NDArray[np.float64] | None,
) -> NDArray[np.float32]:
    """Loss weight of each event, float32 `[E]`: that of its type times that of its value.

    An event without a type, or without a value (NaN), has 1 for that factor.

    Raises:
        InputError: a setting needs a column, or names an event type, that the log does not have,
            or all weights are 0.
    """
    weight_E = _by_type(settings.weights, "weights", num_events, event_type_E)
    weight_E = weight_E * _by_value(
        settings.weight_from_value, "weight_from_value", num_events, value_E
    )
    if num_events and not weight_E.any():
        raise InputError(
            "every event has weight 0 under feedback: give some event types or values more"
        )
    return weight_E


def event_rewards(
    settings: FeedbackSettings,
    num_events: int,
    event_type_E: NDArray[np.object_] | None,
    value_E: NDArray[np.float64] | None,
) -> NDArray[np.float32]:
    """Reward r ∈ [0, 1] of each event, float32 `[E]`: that of its type times that of its value.

    An event without a type, or without a value (NaN), has 1 for that factor.

    Raises:
        InputError: a setting needs a column, or names an event type, that the log does not have.
    """
    return _by_type(settings.rewards, "rewards", num_events, event_type_E) * _by_value(
        settings.reward_from_value, "reward_from_value", num_events, value_E
    )


def event_worth(settings: FeedbackSettings, log: Histories) -> NDArray[np.float32]:
    """Weight times reward of each event of held-out users, float32 `[E]`.

    How much it says, as training sees it, of what should be recommended. Types that these users
    happen not to have are no mistake.
    """
    types = set() if log.event_type_E is None else {t for t in log.event_type_E if t is not None}
    met = settings.model_copy(
        update={
            name: {t: v for t, v in getattr(settings, name).items() if t in types}
            for name in ("weights", "rewards")
        }
    )
    columns = log.num_events, log.event_type_E, log.value_E
    worth_E = _by_type(met.weights, "weights", *columns[:2])
    worth_E = worth_E * _by_value(met.weight_from_value, "weight_from_value", *columns[::2])
    return worth_E * event_rewards(met, *columns)


def _by_value(
    ends: tuple[float, float] | None,
    name: str,
    num_events: int,
    value_E: NDArray[np.float64] | None,
) -> NDArray[np.float32]:
    """Linear from the first end (0) to the second (1), clipped; 1 for events without a value."""
    if ends is None:
        return np.ones(num_events, dtype=np.float32)
    if value_E is None:
        raise InputError(
            f"feedback.{name} needs event values: map a column to event_value, "
            "or remove the setting"
        )
    zero, one = ends
    share_E = np.clip((value_E - zero) / (one - zero), 0.0, 1.0)
    return np.where(np.isnan(value_E), 1.0, share_E).astype(np.float32)


def _by_type(
    table: dict[str, float],
    name: str,
    num_events: int,
    event_type_E: NDArray[np.object_] | None,
) -> NDArray[np.float32]:
    """The table's entry for each event's type, 1 where it has none."""
    if not table:
        return np.ones(num_events, dtype=np.float32)
    if event_type_E is None:
        raise InputError(
            f"feedback.{name} names event types but the log has none: map a column to event_type, "
            "or remove the setting"
        )
    known = {t for t in event_type_E if t is not None}
    if num_events and (unknown := sorted(table.keys() - known)):
        raise InputError(
            f"feedback.{name}.{unknown[0]}: the log has no such event type "
            f"(it has: {', '.join(sorted(known)) or 'none'})"
        )
    return np.fromiter(
        (table.get(event_type, 1.0) for event_type in event_type_E), np.float32, num_events
    )
