"""Times: measured, and told."""

import statistics
import time
from collections.abc import Callable


def passed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    functions: dict[str, Callable[[], object]],
    repetitions: int,
    progress: Callable[[], object] | None = None,
    seconds: Callable[[Callable[[], object]], float] = passed,
    warm_up: int = 1,
) -> dict[str, float]:
    """The median seconds of each function; all run in turn, so that a busy machine disturbs them alike, `repetitions`
    times after some to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + warm_up):
        for name, function in functions.items():
            taken = seconds(function)
            if repetition >= warm_up:
                times[name].append(taken)
            if progress:
                progress()
    return {name: statistics.median(values) for name, values in times.items()}


def duration(seconds: float) -> str:
    """Seconds for people: 48 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, least, digits in (("days", 86400, 172800, 1), ("h", 3600, 5400, 1), ("min", 60, 90, 0)):
        if seconds >= least:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
