"""Steps as CUDA graphs, with the recorder's GPU stood in for: what is called, recorded, replayed, on which values."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from skiprnn.training.graph import Recorder


class Gpu:
    """Stands in for torch.cuda: notes what is called; a graph replays the function that was called while recording."""

    def __init__(self):
        self.notes: list[str] = []
        self.recording = None

    def Stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: self.notes.append("stream waits"))

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])
        graph.replay = lambda: [call() for call in graph.calls]
        return graph

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.notes.append("caller waits"))

    def graph_pool_handle(self):
        return "pool"

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph, pool, stream):
        self.recording = graph
        yield
        self.recording = None


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name in ("Stream", "CUDAGraph", "current_stream", "graph_pool_handle", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    return gpu


def counting(gpu):
    """A function that adds its first tensor to a total, or records that it will; and the total."""
    total = torch.zeros(())

    def add(tensors):
        def now():
            total.add_(tensors[0].sum())

        gpu.notes.append("recorded" if gpu.recording else "called")
        gpu.recording.calls.append(now) if gpu.recording else now()

    return add, total


def test_a_step_is_called_once_recorded_once_and_then_replayed_on_what_it_is_given(gpu):
    add, total = counting(gpu)
    recorder = Recorder(torch.device("cuda"))
    for step in range(5):
        recorder(add, [torch.full((3,), 10.0**step), None], "add")
        recorder.join()
    assert total == 3 * 11111
    assert (
        gpu.notes
        == ["stream waits", "called", "caller waits", "stream waits", "recorded", "caller waits"]
        + [
            "stream waits",
            "caller waits",
        ]
        * 3
    )


def test_other_shapes_and_other_names_are_other_graphs(gpu):
    add, total = counting(gpu)
    recorder = Recorder(torch.device("cuda"))
    for _ in range(3):
        for size, name in ((3, "add"), (2, "add"), (3, "another")):
            recorder(add, [torch.ones(size)], name)
            recorder.join()
    assert total == 3 * 8
    assert [note for note in gpu.notes if note in ("called", "recorded")] == ["called"] * 3 + ["recorded"] * 3


def test_without_a_gpu_it_is_a_call(gpu):
    add, total = counting(gpu)
    recorder = Recorder(torch.device("cpu"))
    for _ in range(3):
        recorder(add, [torch.ones(2)], "add")
        recorder.join()
    assert total == 6
    assert gpu.notes == ["called"] * 3
