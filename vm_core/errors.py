"""The one error that a user is meant to read."""


class VisualMemoryError(Exception):
    """Something the user can mend. The text names the value, the cause and the remedy."""


class UnreachableError(VisualMemoryError):
    """A store does not answer. It says nothing about the file that was asked for."""
