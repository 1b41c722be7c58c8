"""The compiled CPU path compiles once a variant, whatever the shapes, the rates and the step counts are."""

import pytest
import torch
from torch._dynamo.utils import counters

from leanstep.kernels import use_backend
from leanstep.kernels._compile import is_dense, share_layout
from leanstep.optimizers import Lion, SinkGD


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("cls", "options", "dtype"),
    [
        (Lion, {"weight_decay": 0.1}, torch.float32),
        (Lion, {"rounding": "stochastic"}, torch.bfloat16),
        (SinkGD, {"algorithm": "sinkgd", "weight_decay": 0.1}, torch.float32),
        (SinkGD, {"algorithm": "sinkgd", "rounding": "stochastic"}, torch.bfloat16),
    ],
)
def test_one_graph_for_all_sizes(cls, options, dtype):
    """In six steps of a schedule, with the rate a number and then a tensor, nothing is compiled but at the first."""
    shapes = [(3, 128), (65, 192), (17, 64 * 9), (128, 128), (2, 4096), (1000, 256)]
    params = [torch.ones(s, dtype=dtype, requires_grad=True) for s in shapes]
    optimizer = cls(params, lr=1e-3, **options)
    for param in params:
        param.grad = torch.randn_like(param)
    with use_backend("compiled"):
        params[0].grad, kept = None, params[0].grad
        optimizer.step()
        params[0].grad = kept
        compiled = graphs()
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step) if step < 4 else torch.tensor(1e-4)
            optimizer.step()
        other = [torch.ones(s, dtype=dtype, requires_grad=True) for s in [(9, 1280), (77, 128), (5, 3), (66, 128)]]
        for param in other:
            param.grad = torch.randn_like(param)
        cls(other, lr=0.5, **options).step()
    assert graphs() == compiled


def test_layout_predicates():
    x = torch.zeros(4, 6)
    assert is_dense(x) and is_dense(x.t()) and is_dense(torch.zeros(())) and is_dense(torch.zeros(3, 1, 2).mT)
    assert not is_dense(x[:, ::2]) and not is_dense(x[:, :3]) and not is_dense(torch.zeros(1, 6).expand(4, 6))
    y, z = torch.zeros(4, 6), torch.zeros(6, 4).t()
    assert share_layout([x, y, None], row_major=True)
    assert not share_layout([x, z], row_major=False)
    assert share_layout([z, torch.zeros(6, 4).t()], row_major=False)
    assert not share_layout([z, torch.zeros(6, 4).t()], row_major=True)
    assert not share_layout([x, x.view(-1)], row_major=False)
