"""The command of a Spark executor in a Kubernetes pod.

Spark starts executor pods with the image's entry point and the argument `executor`; all other parameters are
environment variables (`BasicExecutorFeatureStep` in Spark's Kubernetes module). Spark's own images have a shell script
for this. Here the entry point is `imagestream`, so `executor` is one of its commands.
"""

from collections.abc import Mapping
from pathlib import Path

from streaming.errors import ConfigurationError

BACKEND = "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend"
MEMORY = "SPARK_EXECUTOR_MEMORY"
ARGUMENTS = {
    "--driver-url": "SPARK_DRIVER_URL",
    "--executor-id": "SPARK_EXECUTOR_ID",
    "--cores": "SPARK_EXECUTOR_CORES",
    "--app-id": "SPARK_APPLICATION_ID",
    "--hostname": "SPARK_EXECUTOR_POD_IP",
    "--resourceProfileId": "SPARK_RESOURCE_PROFILE_ID",
    "--podName": "SPARK_EXECUTOR_POD_NAME",
}
JAVA_OPTION = "SPARK_JAVA_OPT_"  # and a number


def executor_command(java: Path, spark_home: Path, variables: Mapping[str, str]) -> list[str]:
    """The command line of the executor's JVM.

    Args:
        spark_home: the folder with Spark's `jars/`.
        variables: the environment of the container.

    Raises:
        ServiceError: variables that Spark sets are missing.
    """
    missing = [name for name in (MEMORY, *ARGUMENTS.values()) if not variables.get(name)]
    if missing:
        raise ConfigurationError(
            f"expected the variables that Spark gives to an executor on Kubernetes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: let Spark start it, by IMAGESTREAM_MASTER=k8s://…"
        )
    numbers = sorted(int(name.removeprefix(JAVA_OPTION)) for name in variables if name.startswith(JAVA_OPTION))
    places = (variables.get("SPARK_CONF_DIR"), variables.get("SPARK_CLASSPATH"), f"{spark_home}/jars/*")
    return [
        str(java),
        *(variables[f"{JAVA_OPTION}{number}"] for number in numbers),
        f"-Xms{variables[MEMORY]}",
        f"-Xmx{variables[MEMORY]}",
        "-cp",
        ":".join(place for place in places if place),
        BACKEND,
        *(word for option, name in ARGUMENTS.items() for word in (option, variables[name])),
    ]
