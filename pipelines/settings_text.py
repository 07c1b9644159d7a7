"""Settings as a person reads them: YAML with the comments of the source, good for --settings."""

import json
import textwrap
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from model.settings import SettingsBase
from pipelines.settings import Settings, load

WIDTH = 100
PAGE = """# Settings

Written by `make golden` from the source; the same text, with the values in force, is what
`hrnn settings` prints (`hrnn settings train`: one section). Save it, change what you want, and give
it to `hrnn run --settings FILE`, or override one value with `--set section.key=value`. `null`:
derived from the data.

```yaml
{settings}
```
"""


def to_yaml(settings: Settings, names: Iterable[str] = ()) -> str:
    """Every setting, value in force and meaning; reading it back gives the same values.

    Args:
        names: of sections; none: all.
    """
    wanted = tuple(names) or tuple(settings.sections)
    lines = [line for n in wanted for line in _section(n, settings.sections[n], "")]
    return "\n".join(lines).lstrip()


def describe(section: type[SettingsBase]) -> str:
    """A section in one line, for where its default value stands beside it."""
    unset = [name for name, f in section.model_fields.items() if f.default is None]
    return summary(section) + (f" Not set by default: {', '.join(unset)}." if unset else "")


def to_page() -> str:
    """docs/settings.md: the defaults."""
    return PAGE.format(settings=to_yaml(load()))


def _section(name: str, section: SettingsBase, indent: str) -> Iterator[str]:
    if not indent:
        yield ""
    yield from _comment(summary(type(section)), indent)
    yield f"{indent}{name}:"
    comments = type(section).comments()
    values = section.model_dump(mode="json")
    for field, info in type(section).model_fields.items():
        value = getattr(section, field)
        inner = indent + "  "
        if isinstance(value, SettingsBase):
            yield from _section(field, value, inner)
            continue
        line = f"{inner}{field}: {json.dumps(values[field], ensure_ascii=False)}"
        said = "; ".join(filter(None, [comments.get(field, ""), _choices(info.annotation)]))
        if said and len(line) + len(said) + 4 > WIDTH:
            yield from _comment(said, inner)
            yield line
        else:
            yield f"{line}  # {said}" if said else line


def summary(section: type[SettingsBase]) -> str:
    """A section in a few words: the first line of its docstring."""
    return (section.__doc__ or "").strip().split("\n")[0]


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _choices(annotation: Any) -> str:
    """The values that a setting with few of them can take."""
    kinds = [annotation, *get_args(annotation)]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return "one of " + ", ".join(str(member.value) for member in kind)
        if get_origin(kind) is Literal:
            return "one of " + ", ".join(map(str, get_args(kind)))
    return ""
