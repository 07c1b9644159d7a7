"""Base of every settings object: typed, frozen, JSON in and out, unknown keys refused."""

import inspect
import io
import re
import tokenize
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import InputError


class SettingsBase(BaseModel):
    """A frozen settings section. Subclasses live beside what they configure."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True
    )

    @classmethod
    def comments(cls) -> dict[str, str]:
        """What the source says of each field: the comment beside it, or in lines of its own above.

        So the code, the command line and the docs say the same.
        """
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, SettingsBase) and base is not SettingsBase:
                found |= _comments(inspect.getsource(base))
        return {name: text for name, text in found.items() if name in cls.model_fields}

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
                    given = repr(e.get("input"))
                    # An address may hold a password, the more so when it is not understood.
                    got = "" if "@" in given or "://" in given else f" (got {given})"
                    problems.append(f"{key}: {e['msg']}{got}")
            raise InputError("; ".join(problems)) from None


def _comments(source: str) -> dict[str, str]:
    above: list[str] = []
    field = ""
    found: dict[str, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#"):
                above.append(text)
            elif field:
                found.setdefault(field, []).append(text)
        elif token.type == tokenize.NAME and (match := _FIELD.match(token.line)):
            if match[1] != field:
                field = match[1]
                found.setdefault(field, []).extend(above)
            above = []
        elif token.type == tokenize.NAME:
            above = []
    return {name: " ".join(_NOT_SAID.sub("", t) for t in texts) for name, texts in found.items()}


_FIELD = re.compile(r"    (\w+): ")
_NOT_SAID = re.compile(r"noqa:.*$")
