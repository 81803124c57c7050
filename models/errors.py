"""The exception that `models` raises for a problem that its user can fix."""


class ModelError(ValueError):
    """A model, weights file or bundle that cannot be used; the message says what was expected and what was found."""
