"""The one exception that publishing raises for something a user can mend."""


class PublishError(Exception):
    """A path, limit or broker that publishing cannot work with; the message says what was expected and what was got."""
