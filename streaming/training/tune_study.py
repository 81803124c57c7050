"""A hyperparameter study on disk: an Optuna journal of JSON lines."""

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

STARTUP_TRIALS = 10  # random trials before the sampler uses earlier results


@dataclass(frozen=True)
class TrialResult:
    """The result of one trial: its settings and their metrics on the validation rows.

    Attributes:
        variant: name of the features.
        accuracy: accuracy on the validation rows.
        macro_f1: macro F1 on the validation rows.
        log_loss: log loss on the validation rows, in nats.
        components: output width of the projection.
        images_per_s: throughput of one core, including decoding, backbone and head.
        seconds: duration of the fit, possibly in parallel with others.
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
    """Replaces Optuna's file locks, which survive a killed process; the lock around the search is sufficient."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextmanager
def open_study(path: Path, name: str, seed: int, first: dict[str, Any]) -> Iterator["optuna.Study"]:
    """Open or create the study of this name; unfinished trials of a killed run count as failed.

    Args:
        path: the journal.
        first: suggestions of a new study's first trial.

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
            # With the same seed, a second run would repeat the proposals of the first.
            seed += len(study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"the studies in {path} cannot be read ({error}): remove the file to start over") from error
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    if not study.trials:
        study.enqueue_trial(first)
    yield study


def _drop_torn_line(path: Path) -> None:
    """Truncate an incomplete last line of a killed process, to which the next line would be appended."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def record(study: "optuna.Study", trial: "optuna.Trial", result: TrialResult | str) -> None:
    """Record the result of a trial, or why it failed."""
    from optuna.trial import TrialState

    if isinstance(result, str):
        trial.set_user_attr("why", result)
        study.tell(trial, state=TrialState.FAIL)
    else:
        trial.set_user_attr("outcome", result.as_record())
        study.tell(trial, result.accuracy)


def finished(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Return the trials that have a result or a reason for failure, without those of a killed run."""
    trials = study.get_trials(deepcopy=False)
    return [one for one in trials if "outcome" in one.user_attrs or "why" in one.user_attrs]


def outcomes_of(study: "optuna.Study") -> list[TrialResult]:
    """Return the results in order of the trials."""
    records = [one.user_attrs["outcome"] for one in finished(study) if "outcome" in one.user_attrs]
    return [TrialResult(**(one | {"options": options_from_record(one["options"])})) for one in records]
