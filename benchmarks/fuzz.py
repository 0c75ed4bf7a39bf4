"""Hostile and careless command lines, YAML and files, for as long as one likes: none may break the law of `sandbox.py`.

    python benchmarks/fuzz.py --minutes 30 [--seed 0] [--failing FOLDER]

Prints the counts by kind and exit code, the slowest case, and each way in which the law was broken, with one case of it
in the folder: its files, and its command line in `words`. The tests run the first few dozen of the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile import bytes_cases, command_lines, readers, trees  # noqa: E402
from sandbox import Case, Outcome, Sandbox  # noqa: E402

CHECKS = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]
LIMIT = 120  #: seconds after which a case hangs


class _Hangs(BaseException):
    pass


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def play(sandbox: Sandbox, case: Case) -> Outcome:
    """The outcome of a case, also of one that hangs."""
    try:
        with _limit():
            return sandbox.play(case)
    except _Hangs:
        return Outcome("hangs", "", f"takes more than {LIMIT} s", LIMIT)


class Campaign:
    """Counts of outcomes, and the first case of each way to break the law."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: Counter[tuple[str, str]] = Counter()
        self.problems: Counter[str] = Counter()
        self.slowest: tuple[float, tuple[str, ...]] = (0.0, ())

    def take(self, case: Case, outcome: Outcome) -> None:
        self.codes[case.kind, str(outcome.code)] += 1
        self.slowest = max(self.slowest, (outcome.seconds, case.words))
        if outcome.problem:
            self.problems[outcome.problem[:120]] += 1
            if self.problems[outcome.problem[:120]] == 1:
                self._save(case, outcome)

    def _save(self, case: Case, outcome: Outcome) -> None:
        place = self.folder / str(len(self.problems))
        place.mkdir(parents=True, exist_ok=True)
        (place / "words").write_text(repr(case.words))
        (place / "problem").write_text(f"{outcome.problem}\n\n{outcome.err}", errors="backslashreplace")
        for name, content in case.files.items():
            (place / name.replace("/", "__")).write_bytes(content)

    def report(self) -> str:
        kinds, codes = (sorted({each[place] for each in self.codes}) for place in (0, 1))
        rows = [[kind, *(self.codes[kind, code] for code in codes)] for kind in kinds]
        total = ["all", *(sum(self.codes[kind, code] for kind in kinds) for code in codes)]
        table = tabulate([*rows, total], ["", *codes])
        lines = [f"{count} times: {problem}" for problem, count in self.problems.most_common()]
        seconds, words = self.slowest
        return "\n".join([table, f"slowest: {seconds:.1f} s: {' '.join(words)[:300]!r}", *lines])


def main() -> int:
    """Runs cases until the time is over; 1 if any broke the law."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failing", type=Path, default=Path("fuzz-failing"))
    args = parser.parse_args()
    end, campaign, number = time.monotonic() + 60 * args.minutes, Campaign(args.failing.absolute()), args.seed
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder))
        cases = st.one_of(command_lines(), trees(sandbox.template), bytes_cases(sandbox.template), readers())

        @settings(max_examples=200, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=CHECKS)
        @given(cases)
        def play_some(case: Case) -> None:
            if time.monotonic() < end:
                campaign.take(case, play(sandbox, case))

        while time.monotonic() < end:
            seed(number)(play_some)()
            number += 1
    print(campaign.report())
    return bool(campaign.problems)


if __name__ == "__main__":
    sys.exit(main())
