"""`imagestream doctor`: checks the requirements of the service on this machine, and suggests a fix for each problem."""

import os
import platform
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Set
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from models.errors import ModelError
from models.onnx_session import resolve_providers
from streaming.environment import all_ignored
from streaming.errors import ConfigurationError, ServiceError
from streaming.platform.broker import DEFAULT_PORT, remembered_port, running_broker
from streaming.platform.engines import Engines
from streaming.platform.jars import JARS_HINT, damaged_jars, jars_dir_problem, locked_jars
from streaming.platform.java import find_java
from streaming.platform.kafka_node import is_taken
from streaming.platform.kafka_probe import check_broker as ask_broker
from streaming.platform.kafka_security import client_arguments
from streaming.platform.machine import NAMELESS_USER, has_passwd_entry, memory, user_name
from streaming.platform.scratch import use_scratch
from streaming.registry import CHAMPION, open_registry
from streaming.settings import Settings, cloud_variables
from streaming.storage.home import Home, make_dir

PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 14)
MIN_MEMORY_GIB = 4.0  # Spark 2, the broker 0.7, two Python workers 0.6 each
MIN_DISK_GIB = 2.0
GIB = 1024**3
ANOTHER_HOME = "choose another home with --home PLACE or IMAGESTREAM_HOME"
ANSWER_TIMEOUT_S = 3.0
ENGINES = {"LiteRT": "ai-edge-litert", "ONNX Runtime": "onnxruntime"}
# By scheme of a bucket: what a client needs, each with alternative sets of environment variables.
Alternatives = tuple[tuple[str, ...], ...]
CREDENTIALS: dict[str, tuple[Alternatives, ...]] = {
    "s3": (
        (
            ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"),
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI",),
        ),
        (("AWS_REGION",), ("AWS_DEFAULT_REGION",), ("AWS_ENDPOINT_URL",)),
    ),
    "gs": (
        (
            ("GOOGLE_SERVICE_ACCOUNT",),
            ("GOOGLE_SERVICE_ACCOUNT_PATH",),
            ("GOOGLE_SERVICE_ACCOUNT_KEY",),
            ("GOOGLE_APPLICATION_CREDENTIALS",),
        ),
    ),
    "az": (
        (("AZURE_STORAGE_ACCOUNT_NAME",),),
        (
            ("AZURE_STORAGE_ACCOUNT_KEY",),
            ("AZURE_STORAGE_SAS_TOKEN",),
            ("AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID"),
            ("AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_ID", "AZURE_TENANT_ID"),
        ),
    ),
}


@dataclass(frozen=True)
class Check:
    """The result of a check: what was found, and how to fix a problem."""

    name: str
    found: str
    fix: str | None = None

    @property
    def ok(self) -> bool:
        return self.fix is None


def diagnose(settings: Settings) -> list[Check]:
    """Run all checks; problems are reported, not raised."""
    checks: tuple[Callable[[Settings], Check], ...] = (
        check_python,
        check_environment,
        check_java,
        check_user,
        *(() if settings.place.is_local else (check_work,)),
        check_home,
        check_scratch,
        check_jars,
        check_memory,
        check_disk,
        check_engines,
        check_champion,
        check_broker,
    )
    return [check(settings) for check in checks]


def check_python(_: Settings) -> Check:
    fits = PYTHON_FROM <= sys.version_info[:2] < PYTHON_BELOW
    fix = None if fits else "create the environment again with Python 3.11, 3.12 or 3.13: `make distclean setup`"
    return Check("Python", platform.python_version(), fix)


def check_environment(settings: Settings) -> Check:
    names = all_ignored(local=settings.master.startswith("local"))
    return Check("variables", f"ignored, another Spark's or Hadoop's: {', '.join(names)}" if names else "none ignored")


def _attempt(name: str, find: Callable[[], str], fix: str | None = None) -> Check:
    """A check that passes unless a ServiceError is raised, whose hint is the fix if none is given."""
    try:
        return Check(name, find())
    except ServiceError as error:
        return Check(name, error.problem, fix or error.hint)


def check_java(settings: Settings) -> Check:
    return _attempt("Java", lambda: str(find_java(settings.work_dir)))


def check_work(settings: Settings) -> Check:
    """Check that the work folder of a home in a bucket can be written to."""
    fix = "set IMAGESTREAM_WORK to a writable folder"
    return _attempt("work", lambda: f"{make_dir(settings.work_dir)} can be written", fix)


def check_home(settings: Settings) -> Check:
    """Check that the home can be written to and supports conditional puts."""
    home = settings.place
    try:
        if not home.is_local:
            return _check_bucket(home)
        make_dir(settings.work_dir)
        home.store.check_conditional()
    except ServiceError as error:
        return Check("home", error.problem, error.hint or ANOTHER_HOME)
    return Check("home", f"{settings.home} can be written, and creates each object once")


def _check_bucket(home: Home) -> Check:
    """Check each permission that a stream needs, then conditional puts.

    Raises:
        ServiceError: the bucket does not support conditional puts.
    """
    scheme = home.uri.partition("://")[0]
    key = f"locks/doctor-{uuid.uuid4().hex}"

    def get() -> None:
        if home.store.get(key) != key.encode():
            raise ConfigurationError(
                "another object was returned", hint="choose a store with read-after-write consistency"
            )

    def find() -> None:
        if key not in {one.key for one in home.store.list("locks")}:
            raise ConfigurationError(
                "the object is not in the list", hint="choose a store with list-after-write consistency"
            )

    steps: dict[str, Callable[[], None]] = {
        "put an object": lambda: home.store.put(key, key.encode()),
        "get it": get,
        "list objects": find,
        "delete it": lambda: home.store.delete([key]),
    }
    for step, request in steps.items():
        try:
            request()
        except ServiceError as error:
            unset = missing_variables(scheme, cloud_variables())
            advice = error.hint or ANOTHER_HOME
            fix = f"set {', '.join(unset)}, unless the machine has a role; {advice}" if unset else advice
            return Check("home", f"cannot {step}: {error.problem}", fix)
    home.store.check_conditional()
    return Check("home", f"{home} stores, returns, lists and deletes objects, and creates each once")


def missing_variables(scheme: str, present: Set[str]) -> list[str]:
    """The variables to set so that a client finds credentials, region and account.

    Args:
        scheme: of the home, `s3`, `gs` or `az`.
        present: the names of variables that are set.
    """
    missing = []
    for ways in CREDENTIALS[scheme]:
        if not any(present >= set(way) for way in ways):
            # The alternative of which some variables are set, or else the usual one.
            way = next((way for way in ways if present & set(way)), ways[0])
            missing += [name for name in way if name not in present]
    return missing


def check_jars(settings: Settings) -> Check:
    if why := jars_dir_problem(settings.jars_dir):
        return Check("jars", f"{settings.jars_dir} {why}", JARS_HINT)
    damaged = damaged_jars(settings.jars_dir)
    if not damaged:
        return Check("jars", f"{len(locked_jars())} in {settings.jars_dir}, as locked")
    name, damage = next(iter(damaged.items()))
    others = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return Check("jars", f"{settings.jars_dir / name}: {damage}{others}", "run `imagestream setup`")


def check_memory(_: Settings) -> Check:
    found = memory()
    fix = None if found.total >= MIN_MEMORY_GIB * GIB else f"give the machine or container {MIN_MEMORY_GIB:.0f} GiB"
    return Check("memory", f"{found.total / GIB:.1f} GiB, {found.available / GIB:.1f} GiB of it free", fix)


def check_user(_settings: Settings) -> Check:
    """Check that the user has a name, which Hadoop's login requires."""
    if has_passwd_entry():
        return Check("user", user_name())
    needed, _, fix = NAMELESS_USER.format(uid=os.getuid()).partition(": ")
    return Check("user", needed, fix)


def check_scratch(settings: Settings) -> Check:
    usable = "can be written, and libraries loaded from it"
    return _attempt("scratch", lambda: f"{use_scratch(settings.work_dir)} {usable}")


def check_disk(settings: Settings) -> Check:
    there = next(path for path in (settings.work_dir, *settings.work_dir.parents) if path.is_dir())
    gib = shutil.disk_usage(there).free / GIB
    fix = (
        None
        if gib >= MIN_DISK_GIB
        else f"free {MIN_DISK_GIB:.0f} GiB there, or choose another folder with --home DIR or IMAGESTREAM_WORK"
    )
    return Check("disk", f"{gib:.1f} GiB free at {there}", fix)


def check_engines(settings: Settings) -> Check:
    """Check the inference engines, and ONNX Runtime's execution providers."""
    providers = settings.execution_providers.split(",")
    try:
        found = ", ".join(f"{name} {version(package)}" for name, package in ENGINES.items())
    except PackageNotFoundError as error:
        return Check("engines", f"{error.name} is not installed", "pip install 'imagestream[predict]'")
    try:
        resolve_providers(providers)
    except ModelError as error:
        what, _, fix = str(error).partition(": ")
        return Check("engines", what, fix)
    return Check("engines", f"{found}; providers {', '.join(providers)}; engine {settings.engine}")


def check_champion(settings: Settings) -> Check:
    """Check that the champion can be read, and report its engine; `models verify` checks that the engine can run it."""
    try:
        registry = open_registry(settings.home)
        version = registry.target(CHAMPION)
        if version is None:
            return Check("champion", "none yet: train one with `imagestream train`")
        manifest = registry.manifest(version)
    except (ModelError, ServiceError, OSError) as error:
        return Check("champion", f"cannot be read: {error}", fix="see the check of the home, or restore its models")
    chosen = Engines(settings).known(manifest) or f"not measured yet: `imagestream models verify {version}`"
    return Check("champion", f"version {version}, {manifest.backbone.name}; engine {chosen}")


def check_broker(settings: Settings) -> Check:
    """Check that the configured brokers answer, or that the home's broker is running or can start."""
    if settings.bootstrap_servers:
        servers = settings.bootstrap_servers.split(",")
        silent = [server for server in servers if not _answers(server.strip())]
        if silent:
            return Check(
                "broker",
                f"no answer from {', '.join(silent)}",
                fix="start them, or correct IMAGESTREAM_BOOTSTRAP_SERVERS",
            )
        try:
            ask_broker(settings.bootstrap_servers, client_arguments(settings))
        except ServiceError as error:
            return Check("broker", f"{', '.join(servers)} answers, but denies access", str(error))
        return Check("broker", f"{', '.join(servers)} answers", fix=None)
    running = running_broker(settings)
    if running is not None:
        fix = None if _answers(running.address) else "run `imagestream broker stop`, then `imagestream broker start`"
        return Check("broker", f"{'running' if fix is None else 'does not answer'} at {running.address}", fix)
    port = remembered_port(settings) or DEFAULT_PORT
    free = "free" if not is_taken(port) else "taken by another process: the broker will choose a free one"
    return Check("broker", f"not running; port {port} is {free}")


def _answers(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
