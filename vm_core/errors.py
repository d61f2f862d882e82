"""The one error that a user is meant to read."""


class VisualMemoryError(Exception):
    """Something the user can mend. The text names the value, the cause and the remedy."""
