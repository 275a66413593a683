"""A step recorded once as a CUDA graph and replayed: for small models launching kernels one by one is most of the time."""

from collections.abc import Callable

import torch
from torch import Tensor

Action = Callable[..., Tensor]
Recording = tuple[Tensor, Callable[[], None]]  # where the result will be, and what computes it again

# Calls before the recording: DDP and autograd settle, the optimizer makes its state, libraries choose their kernels.
WARM_UPS = 11


def record_cuda_graph(action: Callable[[], Tensor]) -> Recording:
    """Records the kernels of an action without running them."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may go on calling CUDA.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = action()
    return result, graph.replay


class Replay:
    """A function of tensors of fixed shapes: the first calls run as they are, then it is recorded, and replayed ever after.

    Whatever else it reads or writes must stay where it is: parameters, optimizer state, a learning rate that is a tensor.
    """

    def __init__(
        self,
        action: Action,
        all_have: Callable[[bool], bool],
        record: Callable[[Callable[[], Tensor]], Recording] = record_cuda_graph,
    ) -> None:
        """`all_have` is told whether this rank has a recording, and says whether all have. If not, none uses it."""
        self._action, self._all_have, self._record = action, all_have, record
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._recording: Recording | None = None
        self._side: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result lies in the same memory each time: use it before the next call."""
        self._calls += 1
        if self._calls <= WARM_UPS:
            return self._on_side_stream(*inputs)
        if self._calls == WARM_UPS + 1:
            self._recording = self._recorded(*inputs)
        if self._recording is None:
            return self._action(*inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        result, replay = self._recording
        replay()
        return result

    def close(self) -> None:
        """Forgets the recording."""
        self._recording = None

    def _recorded(self, *inputs: Tensor) -> Recording | None:
        self._inputs = [tensor.clone() for tensor in inputs]
        recording = None
        try:
            recording = self._record(lambda: self._action(*self._inputs))
        except RuntimeError as error:
            print(f"a step could not be recorded: {' '.join(str(error).split())[:200]}", flush=True)
        return recording if self._all_have(recording is not None) else None

    def _on_side_stream(self, *inputs: Tensor) -> Tensor:
        """As torch wants it before a recording: autograd remembers the stream on which a gradient was first added up."""
        if not inputs[0].is_cuda:
            return self._action(*inputs)
        self._side = self._side or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            result = self._action(*inputs)
        main.wait_stream(self._side)
        return result
