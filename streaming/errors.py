"""The one exception that the service raises for something a user can mend."""


class ServiceError(Exception):
    """A setting, file or process that the service cannot work with; the message says what to do about it."""
