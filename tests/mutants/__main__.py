"""`python -m tests.mutants`: make mutants, run their tests and report the survivors."""

import argparse
import os
import random
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants.edits import Mutant, mutants
from tests.mutants.processes import ROOT, baseline, job, run_all, warm_up
from tests.mutants.targets import TARGETS, Target

SURVIVORS = Path(__file__).parent / "survivors.toml"
MIN_KILLED = 0.90
NO_TESTS_RAN = 5  # pytest's exit code

Reasons = dict[tuple[str, str, str], str]  # (module, lines before, lines after) → why no test is needed


@dataclass
class Tally:
    """The results for the mutants of one module."""

    path: str
    made: int = 0
    killed: int = 0
    timeouts: int = 0  # of the killed: those that did not end
    survived: list[Mutant] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected mutants; returns 1 if too few are killed or a survivor has no reason."""
    options = _parser().parse_args(arguments)
    chosen = [one for one in TARGETS if not options.module or any(name in one.path for name in options.module)]
    if not chosen:
        print(f"error: no module is called {', '.join(options.module)}; see --help", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    reasons = read_reasons()
    _log("importing the dependencies of the tests …")
    warm_up(sorted({file for one in chosen for file in one.tests}))
    tallies = [_run(one, options) for one in chosen]
    _print_table(tallies)
    unexplained = _print_survivors(tallies, reasons)
    _print_stale(chosen, reasons, tallies)
    made, killed = sum(one.made for one in tallies), sum(one.killed for one in tallies)
    enough = killed >= MIN_KILLED * made
    if not enough:
        print(f"error: {killed} of {made} mutants were killed, expected at least {MIN_KILLED:.0%}")
    if unexplained:
        print(f"error: {unexplained} survivors have neither a test nor a reason in {SURVIVORS.relative_to(ROOT)}")
    return int(not enough or unexplained > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Insert small faults into the core modules and report those that no test detects.",
        epilog="modules: " + ", ".join(one.path for one in TARGETS),
    )
    parser.add_argument(
        "--module", action="append", metavar="NAME", help="part of a module's path; repeatable (default: all modules)"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="number of random mutants per module (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random selection (default: 0)")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="number of parallel processes (default: 2)"
    )
    return parser


def _run(target: Target, options: argparse.Namespace) -> Tally:
    text = (ROOT / target.path).read_text(encoding="utf-8")
    selected = mutants(text, target.excluded)
    if options.sample is not None and options.sample < len(selected):
        selected = random.Random(options.seed).sample(selected, options.sample)  # noqa: S311
    before = baseline(target)
    total_s = sum(before.seconds.values())
    _log(f"{target.path}: {len(selected)} mutants, {len(before.seconds)} tests of {total_s:.1f} s")
    tally = Tally(target.path, made=len(selected))
    # In the order in which mutants run them, the tests must pass without a fault.
    jobs = [job(None, target, text, before.tests_of(None), total_s)]
    for one in selected:
        tests = before.tests_of(one.scope)
        if tests:
            jobs.append(job(one, target, one.text, tests, total_s))
        else:
            tally.survived.append(one)
    for number, (one, ended) in enumerate(run_all(jobs, options.processes)):
        if one is None:
            if ended.code:
                raise SystemExit(f"error: the tests of {target.path} do not pass in every order")
        elif ended.code in {0, NO_TESTS_RAN}:
            tally.survived.append(one)
        else:
            tally.killed += 1
            tally.timeouts += ended.timed_out
        if number % 25 == 0 or number == len(jobs) - 1:
            _log(f"  {number} of {len(jobs) - 1} run, {len(tally.survived)} survived")
    tally.survived.sort(key=lambda one: one.line)
    return tally


def read_reasons() -> Reasons:
    """The reasons in `survivors.toml`."""
    content = tomllib.loads(SURVIVORS.read_text(encoding="utf-8"))
    return {(one["module"], one["before"], one["after"]): one["reason"] for one in content.get("survivor", [])}


def _print_table(tallies: list[Tally]) -> None:
    width = max(len(one.path) for one in tallies)
    print(f"{'module':{width}}  mutants  killed  of these by timeout  survived")
    total = Tally("all")
    for one in tallies:
        total.made += one.made
        total.killed += one.killed
        total.timeouts += one.timeouts
        total.survived += one.survived
    for one in (*tallies, total):
        print(f"{one.path:{width}}  {one.made:7}  {one.killed:6}  {one.timeouts:19}  {len(one.survived):8}")
    print(f"killed: {total.killed / max(1, total.made):.1%}")


def _print_survivors(tallies: list[Tally], reasons: Reasons) -> int:
    """Print every survivor; returns the number without a reason."""
    unexplained = 0
    for tally in tallies:
        for one in tally.survived:
            reason = reasons.get((tally.path, one.before, one.after))
            unexplained += reason is None
            print(f"\n{tally.path}:{one.line}: {reason or 'NO TEST AND NO REASON'}\n- {one.before}\n+ {one.after}")
    return unexplained


def _print_stale(chosen: list[Target], reasons: Reasons, tallies: list[Tally]) -> None:
    """Print reasons for mutants that no longer exist."""
    made = {
        (one.path, mutant.before, mutant.after)
        for one in chosen
        for mutant in mutants((ROOT / one.path).read_text(encoding="utf-8"), one.excluded)
    }
    paths = {one.path for one in chosen}
    for key in reasons:
        if key[0] in paths and key not in made:
            print(f"\n{SURVIVORS.relative_to(ROOT)}: no such mutant of {key[0]}\n- {key[1]}\n+ {key[2]}")


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
