"""What is wrong with a request, in words: whatever was sent, a reason stays short.

gRPC carries it in the trailing metadata, of which peers take 8 kB (the default soft limit), with
every byte beyond ASCII written as three. What is longer costs the status too.
"""

import reprlib
from typing import Any

MAX_QUOTED = 120  # characters of one value out of the request
MAX_REASON_BYTES = 2000  # UTF-8, of a whole reason

_CUT = "…"
_short = reprlib.Repr()
# Six entries of six of … are a hundred thousand: two levels show what kind of thing it is.
_short.maxlevel = 2


def quoted(value: Any) -> str:
    """A value out of a request as a reason shows it."""
    text = _short.repr(value)
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + _CUT


def bounded(reason: str) -> str:
    """A reason that fits every protocol."""
    if len(reason) * 4 <= MAX_REASON_BYTES:
        return reason
    raw = reason.encode(errors="replace")
    if len(raw) <= MAX_REASON_BYTES:
        return reason
    kept = raw[: MAX_REASON_BYTES - len(_CUT.encode())]
    return kept.decode(errors="ignore") + _CUT
