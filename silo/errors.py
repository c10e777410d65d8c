"""Every error that a user may see: one line that says what was found, what was wanted and what to do.

Nothing of ours is imported here, so that every layer can raise them.
"""


class SiloError(Exception):
    """Something failed. The message is shown as it is, without a traceback."""

    exit_code = 1


class UsageError(SiloError):
    """The call itself is wrong: an unknown option value, a missing file, settings that exclude each other."""

    exit_code = 2


class LicenseError(SiloError):
    """A document whose licence forbids what was about to happen with it."""


class DataError(SiloError):
    """Input that cannot be read as what it should be: a broken line, an empty file, a duplicate id."""


class StoreError(SiloError):
    """A datastore that cannot be opened, changed or trusted."""


class IntegrityError(StoreError):
    """A file whose bytes are not those that its checksum promises."""
