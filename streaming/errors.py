"""The exceptions of the service for what a user can fix; the message says how."""


class ServiceError(Exception):
    """A setting, file or process that the service cannot work with; the message says what to do about it."""


class UsageError(ServiceError):
    """Options, arguments or settings that are wrong in themselves, or contradict each other."""


class UncheckedError(ServiceError):
    """A check that could not be made: it has found neither good nor bad."""
