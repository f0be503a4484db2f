"""Times that a busy machine disturbs alike."""

import statistics
import time
from collections.abc import Callable


def alternate(functions: dict[str, Callable[[], None]], repetitions: int, progress=None) -> dict[str, float]:
    """The median seconds of each function; all run in turn, `repetitions` times after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition:
                times[name].append(time.perf_counter() - start)
            if progress:
                progress()
    return {name: statistics.median(values) for name, values in times.items()}
