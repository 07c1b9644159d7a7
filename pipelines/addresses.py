"""Addresses that people give: those that hold a secret are not written down."""

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from model.errors import InputError

# Whoever has an address with one of these has what it leads to (signed addresses, SAS).
SECRETS = re.compile(r"(^|&)[\w-]*(password|signature|credential|token|sig|accesskeyid)=", re.I)


def holds_secret(address: str) -> bool:
    """Whether an address is as good as a key: a password, a signature."""
    parts = _split(address)
    return bool(parts.password or SECRETS.search(parts.query))


def check_unsigned(addresses: Mapping[str, str]) -> None:
    """Refuse addresses (by option) that hold a secret: a run's parameters are kept and logged.

    Raises:
        InputError: says what to do instead, and not the address.
    """
    for option, address in addresses.items():
        if holds_secret(address):
            raise InputError(
                f"{option}: an address with a password or a signature would be written to the "
                "run's log: fetch the file first and give its path, or give a store's key in its "
                "driver's variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and leave it out "
                "here"
            )


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # [ in a path, say
        return urlsplit("")
