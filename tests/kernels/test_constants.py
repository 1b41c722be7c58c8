"""The cache of small tensors of Python numbers, beside the capture of CUDA graphs."""

import pytest
import torch

from leanstep.kernels.steps import common

CPU = torch.device("cpu")


def test_numbers_that_a_graph_sends_are_not_cached(monkeypatch):
    """Memory that a graph writes is empty until it runs, and what it reads must stay."""
    held = []
    monkeypatch.setattr(common, "_captured", held)
    earlier = common.constant((0.5, 7.25), CPU, torch.float32)
    monkeypatch.setattr(common, "_is_capturing", lambda device: True)
    captured = common.constant((0.5, 7.125), CPU, torch.float32)
    assert captured.tolist() == [0.5, 7.125]
    assert held[0] is captured and held[1].tolist() == [0.5, 7.125]
    assert common.constant((0.5, 7.25), CPU, torch.float32) is earlier and held[2] is earlier
    monkeypatch.setattr(common, "_is_capturing", lambda device: False)
    eager = common.constant((0.5, 7.125), CPU, torch.float32)
    assert eager is not captured and eager.tolist() == [0.5, 7.125]
    assert common.constant((0.5, 7.125), CPU, torch.float32) is eager and len(held) == 3


@pytest.mark.gpu
def test_an_eager_step_after_a_capture_has_its_numbers():
    device, numbers = torch.device("cuda", torch.cuda.current_device()), [0.5, 7.0625]
    graph, target = torch.cuda.CUDAGraph(), torch.zeros(2, device="cuda")
    with torch.cuda.graph(graph):
        target.copy_(common.constant(numbers, device, torch.float32))
    assert common.constant(numbers, device, torch.float32).tolist() == numbers
    graph.replay()
    assert target.tolist() == numbers
