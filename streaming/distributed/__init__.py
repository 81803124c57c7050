"""Data-parallel training of a CNN on Spark's workers with a parameter server on the driver. The modes are synchronous,
asynchronous, and hogwild (asynchronous without locks)."""
