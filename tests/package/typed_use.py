"""A program that uses the public names, for the type checker to read (``.ci/run``); nothing runs it."""

from typing import assert_type

import torch

import leanstep
from leanstep import Lion, SinkGD
from leanstep.kernels import use_backend

model = torch.nn.Linear(4, 4)
lion = Lion(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)
sinkgd = SinkGD(leanstep.param_groups(model), lr=1e-2)
optimizers: list[torch.optim.Optimizer] = [lion, sinkgd]
assert_type(leanstep.Lion(model.parameters()), Lion)
assert_type(leanstep.param_groups(model), leanstep.ParamGroups)
assert_type(leanstep.__version__, str)
with use_backend("reference"):
    lion.step()
