"""A pruned model as an ONNX file for ONNX Runtime, with its zeros (pip install onnxscript onnxruntime)."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder, file = Path("runs/pruned"), Path("runs/pruned.onnx")
if not folder.exists():  # a small model, in the place of one that `leanstep prune` wrote
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    for weight in small.model.layers.parameters():
        if weight.dim() == 2:
            weight.data[weight.abs() < weight.abs().quantile(0.6)] = 0.0
    small.save_pretrained(folder)

model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
).eval()
model.config.use_cache = False
tokens = torch.arange(12).view(2, 6) % model.config.vocab_size
shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
torch.onnx.export(model, (tokens,), file, dynamo=True, dynamic_shapes=(shape,), input_names=["tokens"], verbose=False)
arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
zeros_in_file = sum(int((array == 0).sum()) for array in arrays if array.ndim == 2)
zeros = sum(int((weight == 0).sum()) for weight in model.parameters() if weight.dim() == 2)
session = onnxruntime.InferenceSession(file)
longer = torch.arange(21).view(3, 7) % model.config.vocab_size
logits = session.run(None, {"tokens": longer.numpy()})[0]
error = float(np.abs(logits - model(longer).logits.detach().numpy()).max())
print(f"{zeros_in_file} zeros in {file.name}, {zeros} in the model; logits differ by {error:.1e} at most")
