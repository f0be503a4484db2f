"""Times that a busy machine disturbs alike."""

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
    """The median seconds of each function; all run in turn, `repetitions` times after some to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + warm_up):
        for name, function in functions.items():
            taken = seconds(function)
            if repetition >= warm_up:
                times[name].append(taken)
            if progress:
                progress()
    return {name: statistics.median(values) for name, values in times.items()}
