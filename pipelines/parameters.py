"""Parameters of the pipelines, each written once.

KFP reads a pipeline's parameters, defaults and descriptions from the signature and the docstring
of its function, and shows the defaults in the form of a new run. `takes` writes both: the shared
parameters from here, the settings from their classes.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.digests import code_digest
from pipelines.settings import SECTIONS, defaults
from pipelines.settings_text import describe

# What `ingest` takes, by its names: default and meaning.
SOURCE: Mapping[str, tuple[str, str]] = {
    "dataset": ("", "a named dataset, when no interactions are given."),
    "interactions": ("", "table of who did what when: a file, an address, or an event log."),
    "users": ("", "table of user fields."),
    "items": ("", "table of item fields."),
    "cache": ("", "folder for downloads."),
    "source_digest": ("", "digest of the source, part of the key of ingest where that is cached."),
}
CODE = "digest of the steps' code: a step whose image holds other code refuses to run."


def takes(
    sections: Sequence[str], **source: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a pipeline's function the shared parameters.

    The function has parameters of its own, described under `Args:` at the end of its docstring, and
    any of these:

    - `source`: receives {name: value} of `SOURCE`, for `ingest(**source, …)`;
    - `code`: receives the digest of the steps' code;
    - `settings`: receives {section: value}; the section `train` is the parameter `train_settings`,
      whose default is every setting with its default, but for those derived from the data.

    Args:
        sections: of the settings.
        source: other defaults of parameters of `SOURCE`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        wanted = inspect.signature(function).parameters
        table: list[tuple[str, Any, str]] = []
        if "source" in wanted:
            table += [(n, source.get(n, value), text) for n, (value, text) in SOURCE.items()]
        own = [p for n, p in wanted.items() if n not in ("source", "code", "settings")]
        after: list[tuple[str, Any, str]] = [("code", code_digest(), CODE)]
        after += [(f"{n}_settings", defaults(n), describe(SECTIONS[n])) for n in sections]
        required = [p for p in own if p.default is inspect.Parameter.empty]
        optional = [p for p in own if p not in required]
        signature = inspect.Signature(
            [*required, *map(_parameter, table), *optional, *map(_parameter, after)]
        )

        @functools.wraps(function)
        def pipeline(*arguments: Any) -> None:
            given = signature.bind(*arguments).arguments
            shared = {
                "source": {n: given[n] for n, _, _ in table},
                "code": given["code"],
                "settings": {n: given[f"{n}_settings"] for n in sections},
            }
            function(
                **{n: v for n, v in shared.items() if n in wanted},
                **{p.name: given[p.name] for p in own},
            )

        pipeline.__signature__ = signature  # type: ignore[attr-defined]
        pipeline.__doc__ = _documented(function, [*table, *after])
        return pipeline

    return decorate


def _parameter(row: tuple[str, Any, str]) -> inspect.Parameter:
    name, default, _ = row
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=type(default),
    )


def _documented(function: Callable[..., None], rows: Sequence[tuple[str, Any, str]]) -> str:
    text = inspect.getdoc(function) or ""
    if "Args:" not in text:
        text += "\n\nArgs:"
    return "\n".join([text, *(f"    {name}: {said}" for name, _, said in rows)])
