"""Errors a person can act on: each message says what is wrong, where, and what to do."""


class HrnnError(Exception):
    """Base of every error this project raises on purpose; shown as one sentence, no traceback."""


class InputError(HrnnError):
    """The caller's data, settings or request is at fault (exit code 2, HTTP 400)."""


class BundleError(HrnnError):
    """A model bundle is missing, corrupt, foreign or of an unsupported version."""


class UnavailableError(HrnnError):
    """Something this process depends on (a store, a server, a port) cannot be reached or used."""


class ConflictError(HrnnError):
    """Somebody else changed the same thing meanwhile; nothing was changed by the caller."""


class RolledBackError(HrnnError):
    """A candidate failed its trial; what served before goes on serving."""
