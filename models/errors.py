"""The one exception that numerics raise for something a user can mend."""


class ModelError(ValueError):
    """A model, weights file or bundle that cannot be used; the message says what was expected and what was got."""
