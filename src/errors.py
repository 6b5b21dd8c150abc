"""The exceptions that mean "the user can mend this"."""


class UserError(Exception):
    """Bad input: the message is one line that names the file, row or flag and says what to do.

    Every script prints it as `error: ...` on stderr and exits with code 2 (see `src/cli/run.py`).
    """


class NotFinite(UserError):
    """A model or a file gave NaN or infinity where only finite numbers are of use; the message names which."""
