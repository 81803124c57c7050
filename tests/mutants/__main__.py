"""`python -m tests.mutants`: make mutants, run their tests, and say which survived."""

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
LEAST_KILLED = 0.90
NOTHING_RAN = 5  # pytest's exit code

Reasons = dict[tuple[str, str, str], str]  # (module, lines before, lines after) → why nothing need notice


@dataclass
class Tally:
    """How the mutants of one module ended."""

    path: str
    made: int = 0
    killed: int = 0
    late: int = 0  # of the killed: those that did not come to an end
    survived: list[Mutant] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that the arguments choose; 1 if too few are killed or a survivor has no reason."""
    options = _parser().parse_args(arguments)
    chosen = [one for one in TARGETS if not options.module or any(name in one.path for name in options.module)]
    if not chosen:
        print(f"error: no module is called {', '.join(options.module)}; see --help", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    reasons = read_reasons()
    _say("importing what the tests need …")
    warm_up(sorted({file for one in chosen for file in one.tests}))
    tallies = [_run(one, options) for one in chosen]
    _print_table(tallies)
    unexplained = _print_survivors(tallies, reasons)
    _print_stale(chosen, reasons, tallies)
    made, killed = sum(one.made for one in tallies), sum(one.killed for one in tallies)
    enough = killed >= LEAST_KILLED * made
    if not enough:
        print(f"error: {killed} of {made} mutants were killed, at least {LEAST_KILLED:.0%} should be")
    if unexplained:
        print(f"error: {unexplained} survivors have neither a test nor a reason in {SURVIVORS.relative_to(ROOT)}")
    return int(not enough or unexplained > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Make small faults in the modules that everything rests on, and say which no test notices.",
        epilog="modules: " + ", ".join(one.path for one in TARGETS),
    )
    parser.add_argument(
        "--module", action="append", metavar="NAME", help="part of a module's path; may be given again (default: all)"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="mutants drawn of each module (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that draw (default: 0)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="tests run at a time (default: 2)")
    return parser


def _run(target: Target, options: argparse.Namespace) -> Tally:
    text = (ROOT / target.path).read_text(encoding="utf-8")
    drawn = mutants(text, target.beyond)
    if options.sample is not None and options.sample < len(drawn):
        drawn = random.Random(options.seed).sample(drawn, options.sample)  # noqa: S311
    before = baseline(target)
    total_s = sum(before.seconds.values())
    _say(f"{target.path}: {len(drawn)} mutants, {len(before.seconds)} tests of {total_s:.1f} s")
    tally = Tally(target.path, made=len(drawn))
    # In the order in which mutants see them, the tests must pass where there is no fault.
    jobs = [job(None, target, text, before.tests_of(None), total_s)]
    for one in drawn:
        tests = before.tests_of(one.scope)
        if tests:
            jobs.append(job(one, target, one.text, tests, total_s))
        else:
            tally.survived.append(one)
    for number, (one, ended) in enumerate(run_all(jobs, options.processes)):
        if one is None:
            if ended.code:
                raise SystemExit(f"error: the tests of {target.path} do not pass in every order")
        elif ended.code in {0, NOTHING_RAN}:
            tally.survived.append(one)
        else:
            tally.killed += 1
            tally.late += ended.late
        if number % 25 == 0 or number == len(jobs) - 1:
            _say(f"  {number} of {len(jobs) - 1} run, {len(tally.survived)} survived")
    tally.survived.sort(key=lambda one: one.line)
    return tally


def read_reasons() -> Reasons:
    """What `survivors.toml` says."""
    content = tomllib.loads(SURVIVORS.read_text(encoding="utf-8"))
    return {(one["module"], one["before"], one["after"]): one["reason"] for one in content.get("survivor", [])}


def _print_table(tallies: list[Tally]) -> None:
    width = max(len(one.path) for one in tallies)
    print(f"{'module':{width}}  mutants  killed  of these late  survived")
    everything = Tally("all")
    for one in tallies:
        everything.made += one.made
        everything.killed += one.killed
        everything.late += one.late
        everything.survived += one.survived
    for one in (*tallies, everything):
        print(f"{one.path:{width}}  {one.made:7}  {one.killed:6}  {one.late:13}  {len(one.survived):8}")
    print(f"killed: {everything.killed / max(1, everything.made):.1%}")


def _print_survivors(tallies: list[Tally], reasons: Reasons) -> int:
    """Print every survivor; returns how many have no reason."""
    unexplained = 0
    for tally in tallies:
        for one in tally.survived:
            reason = reasons.get((tally.path, one.before, one.after))
            unexplained += reason is None
            print(f"\n{tally.path}:{one.line}: {reason or 'NO TEST AND NO REASON'}\n- {one.before}\n+ {one.after}")
    return unexplained


def _print_stale(chosen: list[Target], reasons: Reasons, tallies: list[Tally]) -> None:
    """Print reasons for mutants that are not made any more."""
    made = {
        (one.path, mutant.before, mutant.after)
        for one in chosen
        for mutant in mutants((ROOT / one.path).read_text(encoding="utf-8"), one.beyond)
    }
    paths = {one.path for one in chosen}
    for key in reasons:
        if key[0] in paths and key not in made:
            print(f"\n{SURVIVORS.relative_to(ROOT)}: there is no such mutant of {key[0]}\n- {key[1]}\n+ {key[2]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
