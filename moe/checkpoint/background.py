"""Save checkpoints while training goes on."""

from collections.abc import Iterable
from threading import Thread

from moe.checkpoint.manifest import Written
from moe.checkpoint.saving import Fragment, Save
from moe.config import RunError
from moe.distributed.agreement import on_all_ranks


class BackgroundSaver:
    """Copies the state to host memory, and writes the copy in a thread; at most one save is under way.

    The thread takes part in no collective. All ranks call `start` and `finish` together. On leaving, what
    is under way is finished, unless the ranks have lost each other.
    """

    def __init__(self) -> None:
        self._save: Save | None = None
        self._thread: Thread | None = None
        self._outcome: Written | Exception | None = None

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is None or isinstance(error, RunError):  # which is raised on all ranks
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, save: Save, fragments: Iterable[Fragment]) -> None:
        """Finish the save before, copy this rank's fragments, and begin to write them.

        Raises:
            RunError: the save before failed on some rank, or rank 0 cannot write.
        """
        self.finish()
        save.begin()
        copies = [part._replace(values=part.values.detach().to("cpu", copy=True)) for part in fragments]

        def write() -> None:
            try:
                self._outcome = save.write(copies)
            except Exception as error:
                self._outcome = error  # raised in `finish`
            copies.clear()

        self._save, self._thread = save, Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all ranks have written, and publish the checkpoint; nothing if no save is under way.

        Raises:
            RunError: a tensor is not finite, or a rank could not write.
        """
        if self._save is None or self._thread is None:
            return
        save, thread, self._save, self._thread = self._save, self._thread, None, None

        def written() -> Written:
            thread.join()
            if isinstance(self._outcome, Exception):
                raise self._outcome
            assert self._outcome is not None
            return self._outcome

        save.publish(on_all_ranks(written))
