"""QK-clip: scale down the query and key weights of heads whose logits have grown too large."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from leanstep._torch import attention_projections, factors_of_rows, is_conv1d, is_dtensor, local_part, place_like
from leanstep.lora.attention.monitor import NormMonitor

_QK_NORM = re.compile(r"(q|k|qk|query|key)_?(layer_?)?(norm|ln)")


def clip_factors(logits: Tensor, key_heads: int, threshold: float, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the factors of the query heads [H] and of the key heads [K] for the largest logits S [H] of the heads.

    With g = min(1, threshold / S), and G the smallest g of the H / K query heads that share a key head::

        W_k = G^(1 - alpha) * W_k        every key head
        W_q = g / G^(1 - alpha) * W_q    every query head

    The logits of every head are multiplied by its own g. For K = H these are the paper's factors, g^alpha and
    g^(1 - alpha). A head of a group that another head makes smaller keys for has larger queries instead. Heads with a
    non-finite S have g = 1.
    """
    large = logits.isfinite() & (logits > threshold)
    gamma = torch.where(large, threshold / logits.where(large, threshold), 1.0)
    key = gamma.view(key_heads, -1).amin(dim=1) ** (1.0 - alpha)
    return gamma / key.repeat_interleave(len(gamma) // key_heads), key


class QKClip:
    """Scales the query and key weights of every head whose largest logit S passes a threshold, after a step.

    The rule, per head, with gamma = min(1, threshold / S)::

        W_q = gamma^alpha * W_q,   W_k = gamma^(1 - alpha) * W_k

    so that the head's logits are multiplied by gamma, and those of other heads by 1. Biases of the projections get the
    factor of their head. Query heads that share a key head: see
    :func:`leanstep.lora.attention.clip.clip_factors`.

    S is the largest logit, ``scale * q k``, of the last measured pass of a :class:`leanstep.lora.NormMonitor`: over all
    keys that 256 queries of the first two sequences see, and over the processes that train the model. It is a lower
    bound of the batch's. A layer that the monitor could not measure is not scaled (``monitor.skipped``).

    Args:
        monitor: of the model in training. Its :meth:`NormMonitor.close` ends the clipping, too.
        optimizer: the optimizer in training. One of leanstep scales the rounding state of 16-bit weights with them;
            without it, the bits of the weight beyond its dtype are lost where it is scaled.
        threshold: largest logit that is left alone, tau in the paper, which takes 100.
        alpha: how much of the factor the queries get.
        process_group: the processes that train this model, or this stage of a pipeline; None: all.

    Raises:
        ValueError: a setting is out of range, or attention has no weights whose scale is that of its logits: an unknown
            layout (multi-head latent attention, too), norms of queries and keys, clamped or capped values, adapters,
            parametrizations. The message names the layer.

    Notes:
        Call ``arm()`` before the first forward pass of a step, and ``step()`` after the optimizer's, on every process:
        it is one all-reduce of one number per head. DTensors are scaled shard by shard; nothing is gathered. The
        momentum is not scaled, as in the paper. There is no state to save.

    References:
        Kimi Team, "Kimi K2: Open Agentic Intelligence", arXiv 2507.20534, section 2.1, algorithm 1 (MuonClip).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from leanstep.lora import NormMonitor, QKClip
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with NormMonitor(model) as monitor:
        ...     clip = QKClip(monitor, optimizer, threshold=1e-6)
        ...     clip.arm()
        ...     _ = model(torch.randint(64, (1, 40)), labels=torch.randint(64, (1, 40))).loss.backward()
        ...     optimizer.step()
        ...     print(clip.step())
        2
    """

    def __init__(
        self,
        monitor: NormMonitor,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        threshold: float = 100.0,
        alpha: float = 0.5,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if not threshold > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"QKClip: expected threshold > 0 and alpha in [0, 1], got {threshold} and {alpha}")
        for name, layer in monitor.layers().items():
            if reason := _unfit(layer):
                raise ValueError(
                    f"QKClip: the logits of {name} ({type(layer).__name__}) do not follow the scale of its query and "
                    f"key weights: {reason}. Train this model without QK-clip."
                )
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # inside the wrapper of Accelerate
        self.monitor, self.optimizer, self.threshold, self.alpha = monitor, optimizer, threshold, alpha
        self._process_group = process_group
        self._armed = False
        self._logits: dict[str, Tensor] = {}

    def arm(self, seed: int | None = None) -> None:
        """Measure the next forward pass. ``seed``: of the sample of queries, to repeat it when a run is resumed."""
        if seed is not None:
            self.monitor.generator.manual_seed(seed)
        self.monitor.arm()
        self._armed = True

    @torch.no_grad()
    def step(self) -> int:
        """Scale the heads that passed the threshold in the pass since :meth:`arm`; returns how many (0 without one).

        Raises:
            ValueError: a layer's attention had another number of heads than its weights, as under tensor parallelism.
        """
        if not self._armed:
            return 0
        self._armed = False
        self._logits = self._largest_logits()
        for name, logits in self._logits.items():
            if bool((logits > self.threshold).any()):
                self._scale(self.monitor.layers()[name], logits)
        return sum(self._passed().values())

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log: ``logit/LAYER``, largest logit before the last clipping; ``heads``, how many passed."""
        logits = {f"logit/{name}": float(values.max()) for name, values in self._logits.items()}
        return {**logits, "heads": float(sum(self._passed().values()))} if logits else {}

    def _passed(self) -> dict[str, int]:
        return {
            name: int((values.isfinite() & (values > self.threshold)).sum()) for name, values in self._logits.items()
        }

    def _largest_logits(self) -> dict[str, Tensor]:
        """Return the largest logits of every layer's heads over the processes, -inf for what none has measured."""
        layers, measured = self.monitor.layers(), self.monitor.logits()
        heads = {name: attention_projections(layer)["q"].heads for name, layer in layers.items()}
        table = torch.full((len(layers), max(heads.values())), -torch.inf, dtype=torch.float32)
        for row, name in zip(table, layers, strict=True):
            values = measured.get(name)
            if values is None:
                continue
            if len(values) != heads[name]:
                raise ValueError(
                    f"QKClip: expected the logits of the {heads[name]} heads of {name}, got those of {len(values)}; "
                    "heads divided among processes (tensor parallelism) are not supported"
                )
            row[: len(values)] = values.where(values.isfinite(), -torch.inf)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = local_part(next(self.monitor.model.parameters())).device
            table = table.to(device)
            torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX, self._process_group)
        return {name: row[: heads[name]].double() for name, row in zip(layers, table.cpu(), strict=True)}

    def _scale(self, layer: nn.Module, logits: Tensor) -> None:
        """Scale the weights and biases of a layer's queries and keys."""
        parts = attention_projections(layer)
        query, key = clip_factors(logits, parts["k"].heads, self.threshold, self.alpha)
        by_weight: dict[tuple[nn.Module, str], Tensor] = {}
        for part, factors in ((parts["q"], query), (parts["k"], key)):
            for name in (part.weight, part.bias):
                tensor = getattr(part.module, name, None)
                if tensor is None:
                    continue
                of_rows = factors_of_rows(part, factors, _rows(part.module, tensor))
                previous = by_weight.get((part.module, name))
                by_weight[part.module, name] = of_rows if previous is None else of_rows * previous
        for (module, name), of_rows in by_weight.items():
            param = getattr(module, name)
            stored_by_rows = param.dim() == 2 and not is_conv1d(module)
            self._multiply(param, of_rows[:, None] if stored_by_rows else of_rows)

    def _multiply(self, param: Tensor, factor: Tensor) -> None:
        """Multiply a parameter, and what an optimizer of leanstep keeps of it beyond its dtype."""
        factor = factor.to(torch.promote_types(param.dtype, torch.float32))
        if is_dtensor(param):
            factor = local_part(place_like(factor.expand(param.shape), param))
        factor = factor.to(local_part(param).device)
        multiply = getattr(self.optimizer, "multiply_parameter", None)
        if multiply is None or not multiply(param, factor):
            local_part(param).mul_(factor)


def _rows(module: nn.Module, tensor: Tensor) -> int:
    """Return the number of outputs of a weight or a bias."""
    return tensor.shape[1 if tensor.dim() == 2 and is_conv1d(module) else 0]


def _unfit(layer: nn.Module) -> str:
    """Return why scaling weights does not scale a layer's logits by the same factor; "" if it does."""
    parts = attention_projections(layer)
    if not parts:
        return "its queries and keys are not in weights of a known layout"
    if norms := [name for name, _ in layer.named_children() if _QK_NORM.fullmatch(name)]:
        return f"{', '.join(norms)} normalizes them"
    if getattr(layer, "clip_qkv", None) or getattr(layer, "attn_logit_softcapping", None):
        return "they are clamped"
    if any("lora_" in name for name, _ in layer.named_parameters()):
        return "an adapter adds to them; merge it first"
    if any(hasattr(part.module, "parametrizations") for part in parts.values()):
        return "a parametrization computes them"
    if not all(getattr(parts[name].module, parts[name].weight).is_floating_point() for name in "qk"):
        return "they are quantized"
    return ""
