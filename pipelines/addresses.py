"""Addresses that people give: those that hold a secret are not written down."""

import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from model.errors import InputError

# Whoever has an address with one of these has what it leads to (signed addresses, SAS).
SECRETS = re.compile(
    r"[?&;#]("
    r"[\w.-]*(password|passwd|secret|signature|credentials?|token|sig"
    r"|(api|access|account|secret|auth)[_-]?key([_-]?id)?)"
    r"|pass|pwd|auth|authorization|jwt|code|key"
    r")=",
    re.I,
)
_BEGINNING = re.compile(r"([\w+.-]*)://")  # several where file systems are chained (a::b://c)
_HOST = re.compile(r"(\[[\da-f:.]+\]|[^:\[\]@]*)(:\d*)?", re.I)


def holds_secret(address: str) -> bool:
    """Whether an address is as good as a key: a password, a signature.

    Passwords need not be escaped as they should be (AWS makes them with a slash, and drivers take
    them so): what may be one counts as one, and so does an address that cannot be parsed.
    """
    if SECRETS.search(unquote(address)):
        return True
    if "://" not in address:
        return False  # a path
    try:
        urlsplit(address)
    except ValueError:
        return True
    return any(
        _has_user(found[1].lower(), address[found.end() :])
        for found in _BEGINNING.finditer(address)
    )


def _has_user(scheme: str, rest: str) -> bool:
    """Whether there is a user with a password, or over HTTP, where a name alone is a token, one."""
    first = rest.partition("/")[0]
    if "@" not in rest:
        return False
    if scheme in ("http", "https"):  # a port may follow the host, and @ be in the path
        return "@" in first or not _HOST.fullmatch(first)
    return ":" in rest.rpartition("@")[0].partition("/")[0]


def check_unsigned(addresses: Mapping[str, str]) -> None:
    """Refuse addresses (by option) that hold a secret: a run's parameters are kept and logged.

    Raises:
        InputError: says what to do instead, and not the address.
    """
    for option, address in addresses.items():
        if holds_secret(address):
            raise InputError(
                f"{option}: an address with a password or a signature, or what may be one, "
                "would be written to the run's log: fetch the file first and give its path, or "
                "give a store's key in its driver's variables (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) and leave it out here"
            )
