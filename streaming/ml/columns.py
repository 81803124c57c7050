"""What the stages ask of a DataFrame's columns, told before a job starts, and how columns become what NumPy takes."""

from collections.abc import Callable, Iterator
from typing import Any

from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.types import ArrayType, BinaryType, DataType, DoubleType, FloatType, IntegerType, StructType

from streaming.errors import ConfigurationError, DataError

# Of Spark's image struct (pyspark.ml.image.ImageSchema), what is read.
IMAGE_FIELDS: dict[str, DataType] = {
    "height": IntegerType(),
    "width": IntegerType(),
    "nChannels": IntegerType(),
    "mode": IntegerType(),
    "data": BinaryType(),
}


def column(name: str) -> Column:
    """The column of this very name, dots and all."""
    return F.col("`" + name.replace("`", "``") + "`")


def check_input(stage: str, schema: StructType, name: str) -> DataType:
    """The type of the column `name`.

    Raises:
        ServiceError: there is no such column; says which there are.
    """
    if name not in schema.names:
        raise DataError(f"{stage}: there is no column {name!r} to read; there are: {', '.join(schema.names)}")
    return schema[name].dataType


def check_outputs(stage: str, schema: StructType, names: list[str]) -> None:
    """Refuse to write over a column that is there.

    Raises:
        ServiceError: a name is taken, or given twice.
    """
    for place, name in enumerate(names):
        if name in schema.names or name in names[:place]:
            raise ConfigurationError(f"{stage}: the column {name!r} is there already; give another name for the result")


def is_image(kind: DataType) -> bool:
    """Whether a column of this type holds images: encoded as bytes, or Spark's image struct."""
    struct = {field.name: field.dataType for field in kind.fields} if isinstance(kind, StructType) else {}
    return isinstance(kind, BinaryType) or all(struct.get(name) == expected for name, expected in IMAGE_FIELDS.items())


def is_features(kind: DataType) -> bool:
    """Whether a column of this type holds features: vectors, or arrays of floating point numbers."""
    numbers = isinstance(kind, ArrayType) and isinstance(kind.elementType, (FloatType, DoubleType))
    return numbers or isinstance(kind, VectorUDT)


def check_image(stage: str, schema: StructType, name: str) -> None:
    """Raises ServiceError unless the column `name` is there and holds images."""
    kind = check_input(stage, schema, name)
    if not is_image(kind):
        raise DataError(
            f"{stage}: column {name!r} should hold images (encoded bytes, or what spark.read.format('image') gives), "
            f"it holds {kind.simpleString()}"
        )


def check_features(stage: str, schema: StructType, name: str) -> None:
    """Raises ServiceError unless the column `name` is there and holds features."""
    kind = check_input(stage, schema, name)
    if not is_features(kind):
        raise DataError(
            f"{stage}: column {name!r} should hold features (vectors, or arrays of float or double), "
            f"it holds {kind.simpleString()}"
        )


def as_floats(values: Column, kind: DataType) -> Column:
    """Features of any type that `is_features` takes as array<float>; null stays null."""
    if isinstance(kind, VectorUDT):
        return F.when(values.isNotNull(), vector_to_array(values, "float32"))
    return values.cast(ArrayType(FloatType()))


def as_vector(values: Column) -> Column:
    """array<float> as Spark ML's vector; null stays null."""
    return F.when(values.isNotNull(), array_to_vector(values))


def computed(function: Callable[[Iterator[Any]], Iterator[Any]], values: Column, result_ddl: str) -> Column:
    """What an iterator over Arrow arrays makes of a column; `function` has the type hints that Spark reads.

    It is called not deterministic, so that Spark computes it once, however many columns and filters use the result.
    """
    make: Any = arrow_udf  # whose overloads do not know that Spark reads the type hints
    result: Column = make(function, result_ddl).asNondeterministic()(values)
    return result


def vector_type() -> DataType:
    """The type of a column of Spark ML's vectors."""
    return VectorUDT()
