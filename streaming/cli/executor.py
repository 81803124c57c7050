"""`imagestream executor`: what Spark starts in the pods of its executors on Kubernetes."""

import os

import typer

from streaming.cli.app import app, settings_of


@app.command(hidden=True)
def executor(context: typer.Context) -> None:
    """Run as a Spark executor on Kubernetes, as the variables that Spark gives to its pods say.

    The process becomes the executor's JVM, which so gets the signals of Kubernetes.

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
    os.execve(command[0], command, variables | {"SPARK_HOME": str(spark_home)})  # noqa: S606  it is no shell
