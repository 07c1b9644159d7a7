"""Base of every settings object: typed, frozen, JSON in and out, unknown keys refused."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import InputError


class SettingsBase(BaseModel):
    """A frozen settings section. Subclasses live beside what they configure."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True
    )

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "settings") -> Self:
        """Build from a plain dict (floats that hold whole numbers are accepted as ints).

        Raises:
            InputError: names every wrong key or value and the keys that exist.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = []
            for e in error.errors():
                key = ".".join([where, *map(str, e["loc"])])
                if e["type"] == "extra_forbidden":
                    problems.append(
                        f"{key}: no such setting (known: {', '.join(cls.model_fields)})"
                    )
                else:
                    problems.append(f"{key}: {e['msg']} (got {e.get('input')!r})")
            raise InputError("; ".join(problems)) from None
