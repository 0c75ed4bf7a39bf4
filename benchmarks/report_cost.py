"""What the report costs of a run: seconds, and the share of all of it.

    python benchmarks/report_cost.py -a digits_cnn --quantize-eval --qe-calibration 0.2 --qe-histograms

runs the command line and times what hands over sections of the report and what writes them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlib.app import report, report_results
from qlib.app import run as application
from qlib.cli import main

spent: dict[str, float] = {}
running: list[str] = []


def timed(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with its seconds added to `spent`, unless one that is timed calls it."""

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        if running:
            return work(*args, **kwargs)
        began = time.perf_counter()
        running.append(work.__name__)
        try:
            return work(*args, **kwargs)
        finally:
            running.pop()
            spent[work.__name__] = spent.get(work.__name__, 0.0) + time.perf_counter() - began

    return run


if __name__ == "__main__":
    for module in [each for name, each in sys.modules.items() if name.startswith("qlib.app")]:
        for home in (report, report_results):
            for name in home.__all__:
                if name != "record" and hasattr(module, name):
                    setattr(module, name, timed(getattr(module, name)))
    assert hasattr(application, "write_report")
    began = time.perf_counter()
    code = main(sys.argv[1:])
    whole = time.perf_counter() - began
    cost = sum(spent.values())
    page = Path("latest_log_dir/report.html")
    print({name: round(seconds, 3) for name, seconds in sorted(spent.items())})
    print(
        f"report: {cost:.2f} s of {whole:.1f} s, {100 * cost / whole:.1f} %; {page} has {page.stat().st_size:,} bytes"
    )
    sys.exit(code)
