"""Params shared by several stages, in addition to Spark ML's own."""

# ruff: noqa: N802, N815  Spark ML's way of naming
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasInputCol
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import ConfigurationError

Value = TypeVar("Value")
KEEP, SKIP = "keep", "skip"


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Params among a constructor's `locals()`, without None, with which Spark ML cannot load a stage."""
    return {name: value for name, value in arguments.items() if value is not None and name not in {"self", "__class__"}}


class KeywordParams(Params):
    """Base of stages whose Params can be set by keywords."""

    def setParams(self, **params: Any) -> Self:
        """Set Params by name, like the constructor."""
        return self._set(**given(params))


def param(name: str, doc: str, converter: Callable[[Any], Value]) -> Param[Value]:
    """Return a Param of the class that it is assigned in, declared as in Spark ML's own stages."""
    return Param(Params._dummy(), name, doc, converter)


def input_of(stage: HasInputCol) -> str:
    """Return the name of a stage's input column; raises ServiceError if it is not set."""
    if not stage.isDefined(stage.inputCol):
        raise ConfigurationError(f"{type(stage).__name__} needs an inputCol: the name of the column to read")
    return stage.getInputCol()


class FromImages(KeywordParams):
    """Params of stages that may have no result for a row: how such rows are handled, and the column of reasons."""

    reasonCol = param(
        "reasonCol",
        "name of a string column with the reason why a row has no result, null if it has one; not written if not set",
        TypeConverters.toString,
    )
    handleInvalid = param(
        "handleInvalid",
        "handling of rows whose image is null or cannot be read: keep (with a null result) or skip (drop the row, as "
        "required by a following estimator)",
        TypeConverters.toString,
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(handleInvalid=KEEP)

    def getReasonCol(self) -> str | None:
        """Return the name of the column of reasons, or None."""
        return self.getOrDefault(self.reasonCol) if self.isDefined(self.reasonCol) else None

    def getHandleInvalid(self) -> str:
        """Return `keep` or `skip`."""
        return self.getOrDefault(self.handleInvalid)

    def _with_results(
        self, rows: DataFrame, computed: Column, results: Mapping[str, Callable[[Column], Column]]
    ) -> DataFrame:
        """Add a column for each of `results`, and the column of reasons.

        Args:
            computed: a struct of `streaming.images.ml_worker.RESULT_DDL`.
            results: name of a column → function from array<float> to its value.
        """
        wanted = self.getHandleInvalid()
        if wanted not in {KEEP, SKIP}:
            raise ConfigurationError(f"handleInvalid should be {KEEP} or {SKIP}, got {wanted!r}")
        scratch = f"{self.uid}__computed"
        rows = rows.withColumn(scratch, computed)
        values, reason = F.col(f"{scratch}.values"), self.getReasonCol()
        columns = {name: make(values) for name, make in results.items()}
        if reason:
            columns[reason] = F.col(f"{scratch}.reason")
        if wanted == SKIP:
            rows = rows.where(values.isNotNull())
        return rows.withColumns(columns).drop(scratch)
