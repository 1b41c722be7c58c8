"""Our optimizers inside transformers.Trainer and Accelerate, with a tiny LLaMA, and small problems they must solve."""

import copy
import importlib
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, create, from_parameters, param_groups
from leanstep.optimizers.trainer import MarkHalves, optimizer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:(SinkGD|LANTON). .* taken as"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

OPTIMIZERS = {
    "lion": (Lion, {"lr": 2e-3}),
    "sinkgd": (SinkGD, {"lr": 2e-2}),
    "lanton": (LANTON, {"lr": 5e-3, "alpha": "auto"}),
    "mfac": (MFAC, {"lr": 1e-3, "window": 256}),
}
both = pytest.mark.parametrize("name", OPTIMIZERS)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes))


class Counting(Dataset):
    """Sequences that count up from a number, modulo the vocabulary: easy to learn."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        ids = (torch.arange(12) + i) % 32
        return {"input_ids": ids, "labels": ids}


def build(name, model):
    cls, options = OPTIMIZERS[name]
    return cls(param_groups(model), **options)


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.pop("per_device_train_batch_size", 8),
        gradient_accumulation_steps=options.pop("gradient_accumulation_steps", 2),
        learning_rate=options.pop("learning_rate", 2e-3),
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@both
def test_trainer_with_an_optimizer_object(name, tmp_path):
    """The loss falls, and a run resumed from a checkpoint ends where the uninterrupted one does, bit for bit."""

    def trainer(folder, **options):
        model = tiny_llama()
        settings = arguments(folder, **options)
        return Trainer(model, settings, train_dataset=Counting(), optimizers=(build(name, model), None))

    whole = trainer(tmp_path / "whole", max_steps=12, save_steps=6)
    whole.train()
    seen = losses(whole)
    assert len(seen) == 12 and seen[-1] < 0.9 * seen[0]

    resumed = trainer(tmp_path / "resumed", max_steps=12, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses(resumed)[-6:] == seen[-6:]


@both
def test_trainer_with_a_class(name, tmp_path):
    cls, options = OPTIMIZERS[name]
    settings = arguments(tmp_path, max_steps=10, save_strategy="no", learning_rate=options["lr"])
    trainer = Trainer(
        tiny_llama(), settings, train_dataset=Counting(), optimizer_cls_and_kwargs=(cls, {"lr": options["lr"]})
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.95 * losses(trainer)[0]


@pytest.mark.slow
@both
def test_trainer_with_create(name, tmp_path):
    """The Trainer makes the optimizer itself and gets the one of ``optimizers=``, bit for bit."""
    settings = arguments(tmp_path, max_steps=5, save_strategy="no")
    options = {"name": name, "say": None, **OPTIMIZERS[name][1]}
    made = Trainer(tiny_llama(), settings, train_dataset=Counting(), optimizer_cls_and_kwargs=(lambda: create, options))
    made.train()
    model = tiny_llama()
    given = Trainer(model, settings, train_dataset=Counting(), optimizers=(build(name, model), None))
    given.train()
    assert [group["name"] for group in made.optimizer.param_groups] == [group["name"] for group in param_groups(model)]
    for a, b in zip(made.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_arguments_of_the_trainer_decide_the_rates(tmp_path):
    settings = arguments(tmp_path, max_steps=1, save_strategy="no", learning_rate=3e-3, weight_decay=0.25)
    settings.optim_args = "momentum=0.5, scale=0.1,rounding=kahan"
    pair = optimizer_of(settings, "sinkgd", scale=0.2)
    trainer = Trainer(tiny_llama(), settings, train_dataset=Counting(), optimizer_cls_and_kwargs=pair)
    optimizer = trainer.create_optimizer()
    given = {"lr": 3e-3, "momentum": 0.5, "scale": 0.2, "rounding": "kahan"}
    assert isinstance(optimizer, SinkGD) and given.items() <= optimizer.defaults.items()
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays["hidden"] == 0.25 and decays["norm"] == 0

    settings.optim_args = "like_adamw=True"
    factory, options = optimizer_of(settings, "lion", say=None)
    model = tiny_llama()
    hidden = {group["name"]: group for group in factory()(model, **options).param_groups}["hidden"]
    by_hand = create(tiny_llama(), "lion", like_adamw={"lr": 3e-3, "weight_decay": 0.25}, say=None).param_groups
    assert [(hidden["lr"], hidden["weight_decay"])] == [
        (group["lr"], group["weight_decay"]) for group in by_hand if group["name"] == "hidden"
    ]

    settings.optim_args = "momentum"
    for name, message in (("sinkgdd", "take 'sinkgd'"), ("sinkgd", "expected key=value,key=value, got 'momentum'")):
        with pytest.raises(ValueError, match=message):
            optimizer_of(settings, name)


def roles_of(optimizer):
    names = {"norm": "other", "bias": "other"}
    return {id(p): names.get(group["name"], group["name"]) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["sinkgd", "scale"])
@pytest.mark.parametrize("tied", [False, True])
def test_verls_call_gives_the_optimizer_of_create(name, tied):
    """As verl's build_optimizer calls (its commit b178a3cd): a class of a module, an iterator, rates, overrides."""
    trained, rates = [], {"lr": 3e-3, "weight_decay": 0.1}
    for unnamed in (True, False):
        model = tiny_llama()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        if unnamed:
            build = importlib.import_module("leanstep.optimizers").from_parameters
            optimizer = build(model.parameters(), **rates, **{"name": name, "vocab_size": 32})
        else:
            optimizer = create(model, name, **rates, say=None)
        trained.append((list(roles_of(optimizer).values()).count("hidden"), model, optimizer))
        for _ in range(2):
            model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (count, one, _), (other_count, other, _) = trained
    assert count == other_count == 14
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_automodels_call_keeps_its_factors_and_the_rates_of_roles():
    """As Automodel's factory and scheduler call (its commit 36044ad3): params by name, foreach, factors of groups."""
    model = tiny_llama()
    special = {id(p) for p in model.model.layers[1].parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in special]},
        {"params": list(model.model.layers[1].parameters()), "lr_mult": 0.5, "wd_mult": 2.0},
    ]
    rates = {"lr": 1e-3, "weight_decay": 0.1, "like_adamw": True}
    optimizer = from_parameters(params=groups, name="lion", vocab_size=32, foreach=False, **rates)
    by_hand = create(tiny_llama(), "lion", like_adamw={"lr": 1e-3, "weight_decay": 0.1}, say=None).param_groups[0]
    first = optimizer.param_groups[0]
    assert (first["name"], first["lr"], first["weight_decay"]) == ("hidden", by_hand["lr"], by_hand["weight_decay"])
    factors = [(group["name"], group["lr_mult"], group["wd_mult"]) for group in optimizer.param_groups]
    assert factors == [
        ("hidden", 1, 1), ("hidden", 0.5, 2), ("embedding", 1, 0), ("head", 1, 1), ("other", 1, 0), ("other", 0.5, 0)
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_from_parameters_refuses_what_a_shape_does_not_say():
    def tensors(*shapes):
        return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]

    flattened = tensors((64,))
    flattened[0]._fsdp_flattened = True
    for params, options, message in (
        (flattened, {}, r"FSDP1 has flattened parameter 0 \(64\)"),
        (tensors((4, 4)), {}, r"parameter 0 \(4x4\) may be an embedding, a head or hidden; give vocab_size"),
        (tensors((4,), (2, 4, 4)), {"vocab_size": 0}, r"parameter 1 \(2x4x4\) may be experts"),
        (tensors((8, 4), (8, 4), (8, 4)), {"vocab_size": 8}, r"parameter 2 \(8x4\) is the third matrix"),
        (tensors((8, 4)), {"vocab_size": 7}, "no matrix has vocab_size=7 rows"),
        (tensors((8, 4)), {"vocab_size": 8, "roles": {"9x4": "position"}}, "no parameter to train has the shape 9x4"),
        (tensors((8, 4)), {"vocab_size": 8, "roles": {"8x4": "table"}}, "unknown role 'table'"),
        (tensors((8, 4)), {"vocab_size": 8, "name": "sinkgdd"}, "take 'sinkgd'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_parameters(params, **options)
    roles = {"2x4x4": "expert", "16x4": "position", "8x4": "embedding"}
    optimizer = from_parameters(tensors((2, 4, 4), (16, 4), (8, 4), (4, 4, 3, 3)), "lion", vocab_size=7, roles=roles)
    assert [group["name"] for group in optimizer.param_groups] == ["expert", "conv", "embedding", "position"]


def test_the_plugin_of_axolotl_takes_the_name_from_its_configuration(tmp_path, monkeypatch):
    """Against the calls that axolotl makes (its commit 067b021c): register, validation, post_trainer_create, a step."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for module in (types.ModuleType("axolotl"), types.ModuleType("axolotl.integrations"), base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "leanstep.axolotl", raising=False)
    plugin = importlib.import_module("leanstep.axolotl").Plugin()
    assert isinstance(plugin, base.BasePlugin)
    config = {"optimizer": "leanstep_lanton"}
    plugin.register(config)
    module, _, name = plugin.get_input_args().rpartition(".")
    schema = getattr(sys.modules[module], name)
    assert config.pop("optimizer") == "adamw_torch" and schema(**config).model_dump() == config
    trainer = Trainer(tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=Counting())
    plugin.post_trainer_create(schema(**config).model_dump(), trainer)
    factory, options = trainer.optimizer_cls_and_kwargs
    optimizer = factory()(trainer.model, trainer.args, **options)  # axolotl gives the arguments, too
    assert isinstance(optimizer, LANTON) and optimizer.defaults["lr"] == trainer.args.learning_rate
    untouched = {"optimizer": "adamw_torch"}
    plugin.register(untouched)
    plugin.post_trainer_create(schema().model_dump(), None)
    assert untouched == {"optimizer": "adamw_torch"}
    with pytest.raises(ValueError, match="take 'sinkgd'"):
        plugin.register({"optimizer": "leanstep_sinkgdd"})
    trainer.args.lr_groups = [{"name": "a", "modules": ["b"], "lr": 1e-3}]
    with pytest.raises(ValueError, match="lr_groups: these rates are of axolotl's optimizers"):
        plugin.post_trainer_create(config, trainer)


class Ordered(Trainer):
    """A Trainer that takes its data in their order."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def test_halves_of_a_step_are_marked_in_the_trainer(tmp_path):
    """As by hand, also in the last step of an epoch, which has three micro-batches in place of four."""
    data = Subset(Counting(), range(44))

    def halves(model):
        return LANTON(param_groups(model), lr=5e-3, noise="halves", alpha="auto")

    settings = arguments(
        tmp_path, num_train_epochs=2, save_strategy="no", per_device_train_batch_size=4, gradient_accumulation_steps=4,
        max_grad_norm=0,
    )  # fmt: skip
    model = tiny_llama()
    trainer = Ordered(model, settings, train_dataset=data, optimizers=(halves(model), None), callbacks=[MarkHalves()])
    trainer.train()
    twin = tiny_llama()
    optimizer = halves(twin)
    micro = list(DataLoader(data, batch_size=4))
    for batches in [micro[:4], micro[4:8], micro[8:]] * 2:
        for i, batch in enumerate(batches):
            (twin(**batch).loss / len(batches)).backward()
            if i == 1:
                optimizer.mark_half(2 / len(batches))
        optimizer.step()
        optimizer.zero_grad()
    ours, by_hand = (o.noise_report() for o in (trainer.optimizer.optimizer, optimizer))
    assert all(row["H"] > 0 for row in by_hand)
    assert [row["H"] for row in ours] == pytest.approx([row["H"] for row in by_hand], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "noise", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "halves", "two or more micro-batches per step, got 1"),
        ({"max_grad_norm": 1.0}, "halves", "max_grad_norm=0, got 1.0"),
        ({}, "previous", "no group of LANTON has noise='halves'"),
    ],
)
def test_halves_that_cannot_be_marked_are_refused(options, noise, message, tmp_path):
    model = tiny_llama()
    settings = arguments(tmp_path, max_steps=1, **{"max_grad_norm": 0.0, **options})
    optimizer = LANTON(param_groups(model), noise=noise)
    trainer = Trainer(model, settings, train_dataset=Counting(), optimizers=(optimizer, None), callbacks=[MarkHalves()])
    with pytest.raises(ValueError, match=message):
        trainer.train()


@both
def test_accelerate(name, tmp_path):
    """prepare, accumulation over two passes, clipping, save_state and load_state."""

    def prepared():
        model = tiny_llama()
        optimizer = build(name, model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.02 * step))
        loader = DataLoader(Counting(), batch_size=8)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)

    def train(accelerator, model, optimizer, loader, schedule, epochs):
        seen = []
        for _ in range(epochs):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                seen.append(loss.item())
        return seen

    first = prepared()
    seen = train(*first, epochs=3)
    first[0].save_state(str(tmp_path / "state"))
    rest = train(*first, epochs=2)
    assert rest[-1] < 0.9 * seen[0]

    again = prepared()
    again[0].load_state(str(tmp_path / "state"))
    assert train(*again, epochs=2) == rest
    for a, b in zip(first[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(a, b)


def quadratic(seed):
    """A random, badly scaled quadratic in a matrix; the loss of the start is 1."""
    chance = torch.Generator().manual_seed(seed)
    left = torch.diag(torch.logspace(-1, 1, 12))
    target = torch.randn(12, 8, generator=chance)
    start = torch.zeros(12, 8)
    scale = (left @ target).square().sum()
    return [start.requires_grad_()], lambda params: (left @ (params[0] - target)).square().sum() / scale


def factorisation(seed):
    """A rank-3 matrix as a product of two factors."""
    chance = torch.Generator().manual_seed(seed)
    target = torch.randn(16, 3, generator=chance) @ torch.randn(3, 12, generator=chance)
    factors = [0.1 * torch.randn(s, generator=chance) for s in ((16, 3), (3, 12))]
    scale = target.square().sum()
    return [f.requires_grad_() for f in factors], lambda params: (params[0] @ params[1] - target).square().sum() / scale


def final_loss(problem, seed, build_optimizer, steps=150):
    """Of a problem of a list of tensors, or of a model, whose embedding and head are routed as users are told to."""
    params, loss_of = problem(seed)
    optimizer = build_optimizer(copy.copy(params) if isinstance(params, list) else param_groups(params))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
        schedule.step()
    loss = loss_of(params).item()
    return loss if loss == loss else float("inf")


def language_model(seed):
    """The tiny LLaMA on counting sequences."""
    model = tiny_llama()
    chance = torch.Generator().manual_seed(seed)
    data = Counting()

    def loss_of(_):
        ids = torch.stack([data[int(i)]["input_ids"] for i in torch.randint(48, (8,), generator=chance)])
        return model(input_ids=ids, labels=ids).loss

    return model, loss_of


RATES = {
    "sgd": (torch.optim.SGD, {}, (0.03, 0.1, 0.3, 1.0, 3.0)),
    "lion": (Lion, {}, (0.01, 0.03, 0.1)),
    "sinkgd": (SinkGD, {"scale": 1.0}, (0.03, 0.1, 0.3)),
    "lanton": (LANTON, {"alpha": "auto"}, (0.03, 0.1, 0.3)),
}


def best_loss(name, problem, seed, rates=None, steps=150):
    """Of a few rates, each falling to zero."""
    cls, options, usual = RATES[name]
    return min(
        final_loss(problem, seed, lambda p, lr=lr: cls(p, lr=lr, **options), steps=steps) for lr in rates or usual
    )


@pytest.mark.filterwarnings("ignore")  # of Lightning
def test_halves_follow_lightnings_schedule_of_accumulation(monkeypatch):
    """Also if the callback comes before the one that sets the numbers."""
    lightning = pytest.importorskip("lightning")
    from leanstep.optimizers import lightning as callbacks

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 8)

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return LANTON(param_groups(self), lr=1e-2, noise="halves")

    def run(numbers):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                callbacks.MarkHalves(), lightning.pytorch.callbacks.GradientAccumulationScheduler(scheduling=numbers)
            ],
        )  # fmt: skip
        trainer.fit(Regression(), DataLoader(torch.randn(16, 8), batch_size=2))

    seen, mark_half = [], LANTON.mark_half
    monkeypatch.setattr(
        LANTON, "mark_half", lambda self, part, **rest: seen.append(part) or mark_half(self, part, **rest)
    )
    run({0: 4, 1: 2})
    assert seen == [0.5] * 2 + [0.5] * 4
    with pytest.raises(ValueError, match="two or more micro-batches per step, got 1"):
        run({0: 2, 1: 1})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_problems(seed):
    """A quadratic scaled over four orders, where gradient descent crawls, and a factorisation, where it does not."""
    slow = best_loss("sgd", quadratic, seed)
    for name in ("lion", "sinkgd", "lanton"):
        assert best_loss(name, quadratic, seed) < slow
        assert best_loss(name, factorisation, seed) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_language_model(seed):
    """Far below gradient descent: the margin stands above what the order of a CPU's sums moves."""
    slow = best_loss("sgd", language_model, seed, rates=(0.3, 0.6, 1.0, 1.5), steps=30)
    for name, rates in (("lion", (0.02, 0.04)), ("sinkgd", (0.03, 0.06)), ("lanton", (0.08, 0.12))):
        assert best_loss(name, language_model, seed, rates=rates, steps=30) < slow / 2, name
