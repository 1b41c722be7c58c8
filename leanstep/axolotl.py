"""axolotl's plugin: ``plugins: [leanstep.axolotl.Plugin]`` and ``optimizer: leanstep_sinkgd`` in its configuration."""

from typing import Any

from pydantic import BaseModel

from leanstep.optimizers.create import class_named
from leanstep.optimizers.trainer import optimizer_of

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # for those who read the module without axolotl
    BasePlugin = object


class Arguments(BaseModel):
    """The key that the configuration has besides axolotl's."""

    leanstep_optimizer: str | None = None


class Plugin(BasePlugin):
    """``optimizer: leanstep_NAME``, with ``optim_args`` as :func:`leanstep.optimizers.trainer.optimizer_of`."""

    def get_input_args(self) -> str:
        """Return the dotted name of :class:`Arguments`."""
        return f"{__name__}.{Arguments.__name__}"

    def register(self, cfg: Any) -> None:
        """Take the name from the configuration before axolotl checks it against the names that it knows."""
        before, prefix, name = str(cfg.get("optimizer") or "").partition("leanstep_")
        if prefix and not before:
            class_named(name, "optimizer: leanstep_NAME")
            cfg["optimizer"], cfg["leanstep_optimizer"] = "adamw_torch", name

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the Trainer its optimizer, which it makes when training begins."""
        if not cfg.get("leanstep_optimizer"):
            return
        unused = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")
        if given := [key for key in unused if getattr(trainer.args, key, None) is not None]:
            raise ValueError(f"{', '.join(given)}: these rates are of axolotl's optimizers; leave them out")
        trainer.optimizer_cls_and_kwargs = optimizer_of(trainer.args, cfg["leanstep_optimizer"])
