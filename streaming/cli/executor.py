"""`imagestream executor`: the entry point of Spark's executor pods on Kubernetes."""

import os

import typer

from streaming.cli.app import app, settings_of


@app.command(hidden=True)
def executor(context: typer.Context) -> None:
    """Run as a Spark executor on Kubernetes, configured by the environment variables that Spark sets in its pods.

    The process is replaced by the executor's JVM, which therefore receives the signals of Kubernetes.

    Example: imagestream executor
    """
    from pathlib import Path

    from pyspark.find_spark_home import _find_spark_home

    from streaming.environment import as_started
    from streaming.platform.executor import executor_command
    from streaming.platform.java import find_java

    variables = as_started()
    spark_home = Path(_find_spark_home())
    command = executor_command(find_java(settings_of(context).work_dir), spark_home, variables)
    os.execve(command[0], command, variables | {"SPARK_HOME": str(spark_home)})  # noqa: S606  no shell is involved
