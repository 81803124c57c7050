"""The name of a class, in the one form in which names are compared, wherever they come from.

Folders of macOS and of many archives spell é as e and an accent (NFD), most else as one character (NFC): they look the
same, and are the same class. Nothing else of a name means anything: `NA`, `None`, `007` and `7.0` are names.
"""

import re
import unicodedata

MAX_LABEL_CHARS = 200
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def class_name(text: str | None) -> str | None:
    """The name in composed form (NFC), on one line, without spaces around it; None where nothing is left."""
    return " ".join(composed(text).split()) or None if text else None


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC): é is one character, whichever system it was written on."""
    return unicodedata.normalize("NFC", text)
