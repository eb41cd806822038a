"""How long other threads stand still while something runs."""

import threading
import time
from collections.abc import Callable


def longest_wait(step: Callable[[], object]) -> float:
    """Seconds that a thread which asks to run every millisecond had to wait at most while `step` ran."""
    waits, over, began = list[float](), threading.Event(), threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not over.is_set():
            began.set()
            time.sleep(0.001)
            now = time.perf_counter()
            waits.append(now - last)
            last = now

    watching = threading.Thread(target=watch)
    watching.start()
    began.wait()
    try:
        step()
    finally:
        over.set()
        watching.join()
    return max(waits)
