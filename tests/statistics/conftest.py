"""Simulations of the statistical procedures: short in `make test`, full in `make soak`, as the fault scenarios are."""

from tests.faults.conftest import form, record, seed

__all__ = ["form", "record", "seed"]
