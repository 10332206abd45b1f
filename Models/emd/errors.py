"""The exceptions of this package. All of them are an :class:`EmdError`."""


class EmdError(Exception):
    """Base of the errors of this package. Every message is one line that says what came and what to do."""

    is_user_error = True  # a script prints it as that line


class ProblemError(EmdError, ValueError):
    """The input is not a transportation problem, or names an unknown solver or option, or an invalid value of one."""


class SolverError(EmdError, RuntimeError):
    """A solver failed or did not converge. The message names the problem by its index in the flattened batch."""


class MissingLibraryError(EmdError, ImportError):
    """The library behind a solver cannot be imported. The message says what to install."""
