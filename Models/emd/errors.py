"""What can go wrong between a cost matrix and its flow. All of it is an :class:`EmdError`."""


class EmdError(Exception):
    """Base of the errors of this package."""


class ProblemError(EmdError, ValueError):
    """What was given is no transportation problem, or asks for a solver or an option that does not exist."""


class SolverError(EmdError, RuntimeError):
    """A solver failed or did not converge. The message names the problem by its index in the flattened batch."""


class MissingLibraryError(EmdError, ImportError):
    """The library behind a solver cannot be imported. The message says what to install."""
