"""One-line errors of failed requests to a bucket, with the cause and the setting to check.

They contain only the store's error code, the HTTP status and the server's address: URLs may contain a signature, and a
store's response may repeat the request.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from streaming.errors import ConfigurationError, ServiceError, StoreAwayError

__all__ = ["ENDPOINTS", "STORE_ERROR", "StoreAwayError", "store_error"]

# The clouds' own variables, which obstore and deltalake read.
ENDPOINTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    }
)
_SERVER = {"s3": "AWS_ENDPOINT_URL and AWS_REGION", "az": "AZURE_STORAGE_ENDPOINT"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_NO_BUCKET = {"NoSuchBucket", "InvalidBucketName", "ContainerNotFound"}
_OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_DENIED = {
    *("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"),
    *("RequestTimeTooSkewed", "AuthenticationFailed", "AuthorizationFailure", "AuthorizationPermissionMismatch"),
    *("401 Unauthorized", "403 Forbidden"),
}
# The metadata servers, which a client without credentials asks for those of its machine.
_METADATA_SERVER = re.compile(r"169\.254\.169\.254|metadata\.google\.internal|identity/oauth2/token")
_CODE = re.compile(r"<Code>(\w{1,80})</Code>")
_STATUS = re.compile(r"status code\W{1,20}(?:\[\d+m\W*)?(\d{3} [A-Z][A-Za-z ]{1,40})")
_ADDRESS = re.compile(r"\b(https?://)(?:[^/@\s]*@)?([^/?\s]{1,200})")
STORE_ERROR = re.compile(
    r"Generic (S3|GCS|MicrosoftAzure|HTTP)|error sending request|timed out|status code|lacked the necessary"
)


def store_error(place: str, error: BaseException) -> ServiceError:
    """Convert an error of obstore or deltalake. Raise the result `from None`, since the original may contain secrets.

    Returns:
        A StoreAwayError if the same request may succeed later; otherwise a ServiceError.
    """
    text = str(error)
    scheme = place.partition("://")[0]
    code = match[1] if (match := _CODE.search(text)) else None
    status = match[1].strip() if (match := _STATUS.search(text)) else None
    reason = code or status
    credentials = _CREDENTIALS.get(scheme, "the credentials")
    if _METADATA_SERVER.search(text):  # it may be temporarily unavailable
        return StoreAwayError(f"no credentials were found for {place}", hint=f"set {credentials}")
    if reason in _NO_BUCKET:
        return ConfigurationError(
            f"the bucket of {place} does not exist ({reason})", hint="create it, or correct IMAGESTREAM_HOME"
        )
    if reason in _OTHER_REGION or "redirect without LOCATION" in text:
        return ConfigurationError(
            f"{place} is in another region ({reason or 'redirect'})", hint="set AWS_REGION to the bucket's"
        )
    if {code, status} & _DENIED or "lacked the necessary privileges" in text or "authentication credentials" in text:
        return ConfigurationError(
            f"{place} denies access ({reason or 'no reason given'})",
            hint=f"check {credentials}, and that they allow reading, writing, listing and deleting objects",
        )
    if reason is None:
        address = match[1] + match[2] if (match := _ADDRESS.search(text)) else None
        reason = "timeout" if "timed out" in text or "timeout" in text.lower().partition("retry_timeout")[0] else None
        reason = f"{reason or 'no connection'}{f' to {address}' if address else ''}"
    return StoreAwayError(f"{place} does not answer ({reason})", hint=f"check {_SERVER.get(scheme, 'the network')}")
