"""A step that is repeated many times on a GPU, captured once and replayed: a launch a step instead of one per kernel."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

EAGER_CALLS = 3  # compile kernels, fill the allocator and load libraries, none of which is possible during a capture


class GraphedStep:
    """Calls ``step(batch)`` as CUDA graphs, one per size of the batch ``(E, b)``. It must not wait for the device.

    The first :data:`EAGER_CALLS` of a size are ordinary calls; so are all if a capture fails, which is a warning.
    """

    def __init__(self, step: Callable[[Tensor], None]) -> None:
        self.step, self.can_capture = step, True
        self.calls: Counter[int] = Counter()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and the batch that each reads

    def __call__(self, batch: Tensor) -> None:
        with torch.cuda.device_of(batch):  # graphs are captured and replayed on the current device
            self._call(batch)

    def _call(self, batch: Tensor) -> None:
        size = batch.shape[1]
        self.calls[size] += 1
        if self.can_capture and self.calls[size] == EAGER_CALLS + 1:
            self._capture(batch)
        if size in self.graphs:
            graph, read = self.graphs[size]
            read.copy_(batch)
            graph.replay()
            return
        # Autograd remembers the stream of a tensor's first use, and the default stream cannot be captured.
        main, side = torch.cuda.current_stream(batch.device), torch.cuda.Stream(batch.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.step(batch)
        main.wait_stream(side)

    def _capture(self, batch: Tensor) -> None:
        graph, read = torch.cuda.CUDAGraph(), batch.clone()
        # A stream of this device: torch keeps one for all captures, that of the first. The mode lets other threads, such as the
        # one that pins what a loader has read, allocate memory meanwhile.
        settings = {"stream": torch.cuda.Stream(batch.device), "capture_error_mode": "thread_local"}
        try:
            # The outer one: a capture that fails to end leaves its stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream(batch.device)), torch.cuda.graph(graph, **settings):
                self.step(read)
            self.graphs[batch.shape[1]] = graph, read
        except RuntimeError as error:
            self.can_capture = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"the prototype fit runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)
