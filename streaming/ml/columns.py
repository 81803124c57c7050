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


def check_input(stage: str, schema: StructType, name: str) -> DataType:
    """Return the type of the column `name`.

    Args:
        stage: the stage's name, for messages.
        schema: the schema of the input.
        name: name of the column.

    Raises:
        ServiceError: there is no such column.
    """
    if name not in schema.names:
        raise DataError(f"{stage}: there is no column {name!r}: expected one of {', '.join(schema.names)}")
    return schema[name].dataType


def check_outputs(stage: str, schema: StructType, names: list[str]) -> None:
    """Check that output columns do not exist yet and are distinct.

    Args:
        stage: the stage's name, for messages.
        schema: the schema of the input.
        names: names of the output columns.

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


def check_image(stage: str, schema: StructType, name: str) -> None:
    """Raise a ServiceError unless the column `name` contains images.

    Args:
        stage: the stage's name, for messages.
        schema: the schema of the input.
        name: name of the column.
    """
    kind = check_input(stage, schema, name)
    if not is_image(kind):
        raise DataError(
            f"{stage}: column {name!r} should contain images (encoded bytes, or what spark.read.format('image') "
            f"gives), "
            f"got {kind.simpleString()}"
        )


def check_features(stage: str, schema: StructType, name: str) -> None:
    """Raise a ServiceError unless the column `name` contains features.

    Args:
        stage: the stage's name, for messages.
        schema: the schema of the input.
        name: name of the column.
    """
    kind = check_input(stage, schema, name)
    if not is_features(kind):
        raise DataError(
            f"{stage}: column {name!r} should contain features (vectors, or arrays of float or double), "
            f"got {kind.simpleString()}"
        )


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
        values: the column.
        result_ddl: DDL type of the result.
    """
    make: Any = arrow_udf  # its overloads do not cover type hints
    result: Column = make(function, result_ddl).asNondeterministic()(values)
    return result


def vector_type() -> DataType:
    """Return the type of Spark ML's vectors."""
    return VectorUDT()
