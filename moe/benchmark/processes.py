"""Where contenders run: in this process, or in one of their own that sleeps until it is their turn."""

import gc
import io
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from moe.benchmark.contenders import Outcome, Pass
from moe.benchmark.contenders_by_name import build_contender, reference_of
from moe.benchmark.layer_problem import LayerProblem, LayerShape
from moe.benchmark.layer_speed import Timed
from moe.config import RunError
from moe.distributed.launch import keep_freed_memory

# With freed memory kept, the process of its passes at 64 experts grew past a limit of 15 GB; the cause is
# not known. With glibc's default it peaks near 2 GB.
ALWAYS_OWN_PROCESS = ("hf_eager",)


@contextmanager
def running_contenders(
    names: Sequence[str], shape: LayerShape, own: Sequence[str] = (), keep_memory: Sequence[str] = ()
) -> Iterator[tuple[Mapping[str, Timed], Outcome]]:
    """Make contenders, and what they should compute; end all processes afterwards.

    Those in this process share weights where they store them alike.

    Args:
        names: of the contenders.
        shape: of the layer.
        own: those that run in a process, and with an allocator, of their own.
        keep_memory: of these, whose processes keep freed memory. Others have glibc's default.
    """
    problem = LayerProblem(shape, layer_device())
    expected = reference_of(problem).outcome()
    with ExitStack() as stack:
        contenders: dict[str, Timed] = {}
        for name in names:
            if name in own:
                contenders[name] = process = _ContenderProcess(name, shape, keeps=name in keep_memory)
                stack.callback(process.stop)
            else:
                contenders[name] = build_contender(name, problem)
        del problem
        yield contenders, expected


def layer_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _ContenderProcess:
    """Passes calls on to a contender in another process."""

    def __init__(self, name: str, shape: LayerShape, keeps: bool):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, there = context.Pipe()
        arguments = (there, name, shape, keeps, torch.get_num_threads())
        self._process = context.Process(target=_serve, name=name, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def check(self, expected: Outcome) -> None:
        content = io.BytesIO()  # no shared memory, of which containers have little
        torch.save(tuple(tensor.cpu() for tensor in expected), content)
        self._ask("check", content.getvalue())

    def peak_mib(self) -> float | None:
        return self._ask("peak_mib")

    def timed_pass(self) -> Pass:
        return self._ask("timed_pass")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def _ask(self, verb: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((verb, *arguments))
            error, result = self._pipe.recv()
        except (EOFError, OSError):
            raise RunError(f"{self._name}: its process died, perhaps for lack of memory") from None
        if error is not None:
            raise error
        return result


def _serve(pipe: Connection, name: str, shape: LayerShape, keeps: bool, threads: int) -> None:
    """The other process: build a contender, and answer until the pipe closes."""
    if keeps:
        keep_freed_memory()
    torch.set_num_threads(threads)
    contender = None
    while True:
        try:
            verb, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            if contender is None:
                contender = build_contender(name, LayerProblem(shape, layer_device()))
                gc.collect()
                gc.disable()
            if verb == "check":
                arguments = [_outcome(arguments[0], contender.device)]
            answer = None, getattr(contender, verb)(*arguments)
        except RunError as error:
            answer = error, None
        pipe.send(answer)


def _outcome(content: bytes, device: torch.device) -> Outcome:
    return Outcome(*(tensor.to(device) for tensor in torch.load(io.BytesIO(content))))
