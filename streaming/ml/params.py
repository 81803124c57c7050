"""Params that several stages share, beside Spark ML's own."""

# ruff: noqa: N802, N815  Spark ML's way of naming
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasInputCol
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F  # noqa: N812  as Spark's own documentation writes it

from streaming.errors import ConfigurationError

Value = TypeVar("Value")
KEEP, SKIP = "keep", "skip"


def given(**params: Any) -> dict[str, Any]:
    """The Params that are not None: Spark ML cannot read back one that was set to None."""
    return {name: value for name, value in params.items() if value is not None}


def param(name: str, doc: str, converter: Callable[[Any], Value]) -> Param[Value]:
    """A Param of the class that it is assigned in, as Spark ML declares them."""
    return Param(Params._dummy(), name, doc, converter)


def input_of(stage: HasInputCol) -> str:
    """The name of the column that a stage reads.

    Raises:
        ServiceError: it was given none.
    """
    if not stage.isDefined(stage.inputCol):
        raise ConfigurationError(f"{type(stage).__name__} needs an inputCol: the name of the column to read")
    return stage.getInputCol()


class FromImages(Params):
    """Stages whose rows may lack a result: what becomes of these, and where the reason goes."""

    reasonCol = param(
        "reasonCol",
        "name of a string column for why a row has no result, null where it has one; no such column if not set",
        TypeConverters.toString,
    )
    handleInvalid = param(
        "handleInvalid",
        "rows whose image is null or cannot be read: keep (with a null result) or skip (drop the row, as an estimator "
        "that follows in a Pipeline needs it)",
        TypeConverters.toString,
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(handleInvalid=KEEP)

    def getReasonCol(self) -> str | None:
        """Name of the column of reasons, or None."""
        return self.getOrDefault(self.reasonCol) if self.isDefined(self.reasonCol) else None

    def getHandleInvalid(self) -> str:
        """`keep` or `skip`."""
        return self.getOrDefault(self.handleInvalid)

    def _with_results(
        self, rows: DataFrame, computed: Column, results: Mapping[str, Callable[[Column], Column]]
    ) -> DataFrame:
        """`rows` with a column for each of `results`, made of the values of `computed`, and one for the reason.

        Args:
            computed: a struct of `streaming.images.ml_worker.RESULT_DDL`.
            results: name of a column → from array<float> to what it holds.
        """
        wanted = self.getHandleInvalid()
        if wanted not in {KEEP, SKIP}:
            raise ConfigurationError(f"handleInvalid is {KEEP} or {SKIP}, got {wanted!r}")
        scratch = f"{self.uid}__computed"
        rows = rows.withColumn(scratch, computed)
        values, reason = F.col(f"{scratch}.values"), self.getReasonCol()
        columns = {name: make(values) for name, make in results.items()}
        if reason:
            columns[reason] = F.col(f"{scratch}.reason")
        if wanted == SKIP:
            rows = rows.where(values.isNotNull())
        return rows.withColumns(columns).drop(scratch)
