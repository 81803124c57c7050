"""A study on disk: which settings were tried and what they are worth, as Optuna's journal of JSON lines."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaming.errors import DamagedError
from streaming.training.fit_options import FitOptions
from streaming.training.tune_space import options_from_record

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 10  # at random, before the search learns from what it has seen


@dataclass(frozen=True)
class Outcome:
    """One trial: what was fitted, and what it is worth on the validation rows.

    Attributes:
        components: what the projection gives the classifier.
        images_per_s: of one core: decoding, backbone and head together.
        seconds: that the fit took, beside others.
    """

    number: int
    variant: str
    options: FitOptions
    accuracy: float
    macro_f1: float
    log_loss: float
    components: int
    images_per_s: float
    seconds: float

    def as_record(self) -> dict[str, Any]:
        return asdict(self) | {"options": self.options.as_record()}


class _NoLock:
    """Optuna's own locks outlive a process that is killed; the one around the search does not, and is enough."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextmanager
def open_study(path: Path, name: str, seed: int, first: dict[str, Any]) -> Iterator["optuna.Study"]:
    """The study of this name in the file, made if it is not there; what a killed run left half done counts as failed.

    Args:
        seed: of the search.
        first: what a new study tries before anything else.

    Raises:
        ServiceError: the file is damaged.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    _drop_torn_line(path)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            no_lock: Any = _NoLock()
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=no_lock))
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
            # Another seed for each run, or a second one would propose what the first one did.
            seed += len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"the studies in {path} cannot be read ({error}); remove the file to begin anew") from error
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    if not study.trials:
        study.enqueue_trial(first)
    yield study


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed process left of a line: the next line would be appended to it."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def tell(study: "optuna.Study", trial: "optuna.Trial", result: Outcome | str) -> None:
    """Write down an outcome, or why there is none."""
    from optuna.trial import TrialState

    if isinstance(result, str):
        trial.set_user_attr("why", result)
        study.tell(trial, state=TrialState.FAIL)
    else:
        trial.set_user_attr("outcome", result.as_record())
        study.tell(trial, result.accuracy)


def finished(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Trials that came to an end of their own, with an outcome or with why there is none."""
    trials = study.get_trials(deepcopy=False)
    return [one for one in trials if "outcome" in one.user_attrs or "why" in one.user_attrs]


def outcomes_of(study: "optuna.Study") -> list[Outcome]:
    """What was found, in order of the trials."""
    records = [one.user_attrs["outcome"] for one in finished(study) if "outcome" in one.user_attrs]
    return [Outcome(**(one | {"options": options_from_record(one["options"])})) for one in records]
