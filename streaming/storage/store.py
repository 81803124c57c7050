"""Opens the store of a home: small objects by key, in a local folder or in a bucket."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from streaming.errors import ConfigurationError
from streaming.storage.bucket_store import open_bucket
from streaming.storage.local_store import LocalStore
from streaming.storage.store_base import URI, Store, Stored, check_key, is_uri

__all__ = ["Store", "Stored", "check_key", "check_place", "is_uri", "open_store"]

SCHEMES = ("s3", "gs", "az")
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


def check_place(place: str) -> str:
    """Validate a path or the URI of a bucket, and return it without a trailing slash.

    Raises:
        ServiceError: the URI has another scheme, or no bucket.
    """
    uri = URI.fullmatch(place)
    if uri is None:
        return place
    scheme, rest = uri["scheme"].lower(), uri["rest"].rstrip("/").rpartition("@")[2]  # never a password in an error
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise ConfigurationError(f"expected a path or a URI that begins with {known}, got {scheme}://{rest}")
    bucket, _, prefix = rest.partition("/")
    if "@" in uri["rest"] or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise ConfigurationError(f"expected {scheme}://BUCKET/PREFIX, got {scheme}://{rest}")
    if prefix:
        check_key(prefix)
    return f"{scheme}://{rest}"


def open_store(place: str | Path, options: Mapping[str, str] = NO_OPTIONS) -> Store:
    """The store at a path, or at an `s3://`, `gs://` or `az://` URI.

    Args:
        place: the path or URI.
        options: obstore's options of the client, e.g. `endpoint`; others come from the cloud's usual environment
            variables and credential chain.

    Raises:
        ServiceError: the URI has another scheme or no bucket, or obstore does not know an option.
    """
    if not is_uri(place):
        return LocalStore(Path(place))
    return open_bucket(check_place(str(place)), options)
