"""Python's garbage collection, at the same steps on all ranks."""

import gc

_INTERVAL = 100  # steps


class GarbageCollection:
    """While it is entered, garbage is collected in `step` only.

    Python would start it on each rank at a moment of its own, and all other ranks would wait for that one.
    What exists when it is entered is not looked through again.
    """

    def __enter__(self) -> "GarbageCollection":
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()
        gc.unfreeze()

    def step(self, done: int) -> None:
        """After `done` steps: collect, if it is time to."""
        if done % _INTERVAL == 0:
            gc.collect()
