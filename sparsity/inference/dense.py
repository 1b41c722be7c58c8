"""Linear layers with dense weights that generate faster on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from leanstep.kernels import few_token_linear


class FewTokenLinear(nn.Linear):
    """nn.Linear by :func:`~leanstep.kernels.few_token_linear`: up to 8 tokens on a CPU read the weight faster."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return few_token_linear(x, self.weight, self.bias)


def to_few_token_linear(model: nn.Module) -> list[str]:
    """Let the linear layers of a model generate faster on a CPU; their weights stay as they are.

    Layers of the type nn.Linear become :class:`FewTokenLinear`, with the same parameters, hooks and names: heads that
    are tied to an embedding stay tied. Training, compiled calls and those of many tokens compute as before.
    ``load_sparse`` and ``from_pretrained`` of a sparse folder do this to the layers that stay dense.

    Args:
        model: changed in place.

    Returns:
        The names of the layers that changed.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        model.get_submodule(name).__class__ = FewTokenLinear
    return names
