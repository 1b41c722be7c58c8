"""What a training process computes once, done in the server that such processes are forked from; it imports this."""

import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from leanstep._pages import page
from leanstep.recipes.check.costs import fake_model
from leanstep.recipes.config.schema import ModelConfig, RunConfig
from leanstep.recipes.report import report

HELPERS = str(Path(__file__).parent)

# the search path that the server was started with, to find this file
paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", HELPERS)]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)

for folder in (page.TEMPLATES, Path(report.__file__).parent / "templates"):
    for template in folder.glob("*.*"):
        page.environment(folder).get_template(template.name)

get_checkpoint_conversion_mapping("gpt2")

# forward only: backward may start threads, which a fork does not copy
sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
with FakeTensorMode(allow_non_fake_inputs=True):
    ids = torch.zeros(2, 32, dtype=torch.int64)
    fake_model(RunConfig(model=ModelConfig(family="gpt2", config=sizes)), 64)(input_ids=ids, labels=ids)
