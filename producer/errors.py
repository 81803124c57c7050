"""The exception that publishing raises for a problem that its user can fix."""


class PublishError(Exception):
    """A path, limit or broker that cannot be used; the message says what was expected and what was found."""
