"""Normalisation of class names, so that names compare equal wherever they come from.

macOS and many archives write é as e plus a combining accent (NFD), most other systems as one character (NFC): both are
the same class. Names are not interpreted otherwise: `NA`, `None`, `007` and `7.0` are ordinary names.
"""

import re
import unicodedata

MAX_LABEL_CHARS = 200
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def class_name(text: str | None) -> str | None:
    """The name in composed form (NFC), whitespace collapsed and stripped; None if nothing is left."""
    return " ".join(composed(text).split()) or None if text else None


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which é is one character."""
    return unicodedata.normalize("NFC", text)
