"""The bookkeeping of captured steps, with stand-ins for streams and graphs. test_cuda.py has the fit on a GPU."""

import contextlib

import pytest
import torch

from Models import cuda_graph
from Models.cuda_graph import EAGER_CALLS, GraphedStep


class Device:
    """What a CUDA device does with a step: run it, or record it to be replayed."""

    def __init__(self, monkeypatch):
        self.done: list[list[int]] = []
        self.recording = None
        self.captures = self.replays = 0
        stand_in, batch_device = self, torch.device("cpu")

        class Graph:
            def replay(self):
                stand_in.replays += 1
                stand_in.done.append(self.read.tolist())

        class Stream:
            def __init__(self, device=None):
                self.device = device

            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def on(stream):
            before, stand_in.stream = stand_in.stream, stream
            try:
                yield
            finally:
                stand_in.stream = before

        @contextlib.contextmanager
        def graph(found, *, stream, capture_error_mode):
            assert stream.device == batch_device
            assert capture_error_mode == "thread_local"  # the loader pins memory in another thread
            stand_in.captures += 1
            stand_in.recording, stand_in.stream = found, stream  # which torch leaves current if the capture cannot end
            try:
                yield
            finally:
                stand_in.recording = None

        cuda = cuda_graph.torch.cuda
        self.main = self.stream = Stream()
        replaced = {"CUDAGraph": Graph, "Stream": Stream, "stream": on, "graph": graph}
        for name, value in {**replaced, "current_stream": lambda device=None: self.stream}.items():
            monkeypatch.setattr(cuda, name, value)

    def step(self, batch):
        if self.recording is not None:
            self.recording.read = batch  # what a replay reads; nothing is computed
        else:
            self.done.append(batch.tolist())


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Passes over five images in batches of two, whose last is smaller."""
    return [part for number in range(6) for part in (torch.arange(5) + 10 * number).unsqueeze(0).split(2, dim=1)]


def run(step, batches):
    for batch in batches:
        step(batch)


def test_every_batch_is_computed_once_and_in_order(monkeypatch, batches):
    device = Device(monkeypatch)
    step = GraphedStep(device.step)
    run(step, batches)
    assert device.done == [batch.tolist() for batch in batches]
    assert device.captures == 2  # one for each size
    assert device.replays == len(batches) - 2 * EAGER_CALLS


def test_a_failed_capture_is_reported_and_loses_no_step(monkeypatch, batches):
    device = Device(monkeypatch)

    def step(batch):
        if device.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        device.step(batch)

    message = "without a CUDA graph: operation not permitted when stream is capturing$"
    with pytest.warns(RuntimeWarning, match=message):
        run(GraphedStep(step), batches)
    assert device.done == [batch.tolist() for batch in batches]
    assert device.captures == 1
    assert device.stream is device.main
