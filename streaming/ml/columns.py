"""Validation of the stages' columns before a job starts, and conversion of columns for NumPy."""

from collections.abc import Callable, Iterator
from typing import Any

from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.types import ArrayType, BinaryType, DataType, DoubleType, FloatType, IntegerType, StructType

from streaming.errors import ConfigurationError, DataError

# The fields of Spark's image struct (pyspark.ml.image.ImageSchema) that are read.
IMAGE_FIELDS: dict[str, DataType] = {
    "height": IntegerType(),
    "width": IntegerType(),
    "nChannels": IntegerType(),
    "mode": IntegerType(),
    "data": BinaryType(),
}


def column(name: str) -> Column:
    """Return the column of this exact name, which may contain dots."""
    return F.col("`" + name.replace("`", "``") + "`")


def check_outputs(stage: str, schema: StructType, names: list[str]) -> None:
    """Check that output columns do not exist yet and are distinct; `stage` is its name, for messages.

    Raises:
        ServiceError: they are not.
    """
    for place, name in enumerate(names):
        if name in schema.names or name in names[:place]:
            raise ConfigurationError(f"{stage}: the column {name!r} already exists: give another name for the result")


def is_image(kind: DataType) -> bool:
    """Return whether a type is one of images: encoded bytes, or Spark's image struct."""
    struct = {field.name: field.dataType for field in kind.fields} if isinstance(kind, StructType) else {}
    return isinstance(kind, BinaryType) or all(struct.get(name) == expected for name, expected in IMAGE_FIELDS.items())


def is_features(kind: DataType) -> bool:
    """Return whether a type is one of features: vectors, or arrays of floating-point numbers."""
    numbers = isinstance(kind, ArrayType) and isinstance(kind.elementType, (FloatType, DoubleType))
    return numbers or isinstance(kind, VectorUDT)


Kind = tuple[str, Callable[[DataType], bool]]  # what a column should contain, and whether its type does
IMAGES: Kind = ("images (encoded bytes, or what spark.read.format('image') gives)", is_image)
FEATURES: Kind = ("features (vectors, or arrays of float or double)", is_features)


def check_input(stage: str, schema: StructType, name: str, *kinds: Kind) -> DataType:
    """Return the type of the column `name`.

    Args:
        stage: the stage's name, for messages.
        kinds: what the column may contain.

    Raises:
        ServiceError: there is no such column, or it contains something else.
    """
    if name not in schema.names:
        raise DataError(f"{stage}: there is no column {name!r}: expected one of {', '.join(schema.names)}")
    found = schema[name].dataType
    if not any(fits(found) for _, fits in kinds):
        expected = " or ".join(text for text, _ in kinds)
        raise DataError(f"{stage}: column {name!r} should contain {expected}, got {found.simpleString()}")
    return found


def as_floats(values: Column, kind: DataType) -> Column:
    """Convert features to array<float>; null stays null."""
    if isinstance(kind, VectorUDT):
        return F.when(values.isNotNull(), vector_to_array(values, "float32"))
    return values.cast(ArrayType(FloatType()))


def as_vector(values: Column) -> Column:
    """Convert array<float> to Spark ML's vector; null stays null."""
    return F.when(values.isNotNull(), array_to_vector(values))


def computed(function: Callable[[Iterator[Any]], Iterator[Any]], values: Column, result_ddl: str) -> Column:
    """Apply a function over an iterator of Arrow arrays to a column.

    It is declared nondeterministic, so that Spark computes it once even if several columns and filters use the result.

    Args:
        function: the function, with the type hints that Spark reads.
        result_ddl: DDL type of the result.
    """
    make: Any = arrow_udf  # its overloads do not cover type hints
    result: Column = make(function, result_ddl).asNondeterministic()(values)
    return result
