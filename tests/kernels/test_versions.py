"""Steps count the versions of what they write, so that autograd refuses a graph that was built before them."""

import pytest
import torch

from leanstep.kernels import use_backend
from leanstep.optimizers import LANTON, Lion, SinkGD

SINKGD = {"num_iters": 1, "lr": 0.1, "algorithm": "sinkgd"}
MAKERS = {
    "lion": lambda group: Lion([group], lr=0.1),
    "lion_int8": lambda group: Lion([group], lr=0.1, momentum_dtype=torch.int8),
    "sinkgd": lambda group: SinkGD([{**group, **SINKGD}], rounding="kahan"),
    "sinkgd_int8": lambda group: SinkGD([{**group, **SINKGD}], momentum=0.9, momentum_dtype=torch.int8),
    "lanton_int8": lambda group: LANTON([{**group, "norm": "rms"}], lr=0.1, momentum_dtype=torch.int8),
    "adamw_int8": lambda group: SinkGD([{**group, "algorithm": "adamw"}], momentum_dtype=torch.int8),
}


def check_step(name):
    """Build a graph that needs the weights, step twice, and let the graph run backward."""
    param = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    optimizer = MAKERS[name]({"params": [param]})
    param.grad = torch.randn(4, 6, dtype=torch.bfloat16)
    optimizer.step()
    state = {key: t for key, t in optimizer.state[param].items() if isinstance(t, torch.Tensor)}
    versions = {key: (t._version, t.clone()) for key, t in state.items()}
    x = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = (x @ param).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for key, (version, before) in versions.items():
        assert state[key] is optimizer.state[param][key]
        assert state[key]._version > version or torch.equal(state[key], before), key


@pytest.mark.parametrize("name", MAKERS)
def test_on_the_host(name):
    check_step(name)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_in_triton(name):
    pytest.importorskip("triton")
    with use_backend("triton"):
        check_step(name)
