"""What an installed class accepts, read from its source without importing it (importing torch takes a second).

A recipe's ``optimizer.args`` and ``model.config`` are checked against these signatures, so that there is no second
list of hyperparameters to keep in step with the classes.
"""

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["MODEL_CONFIGS", "OPTIMIZERS", "Accepts", "model_config_fields", "optimizer_arguments", "string_constants"]

DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64")
_SIMPLE = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "None": "null"}
_LISTS = {"list", "tuple", "Sequence", "Iterable", "set", "frozenset"}
_MAPPINGS = {"dict", "Mapping", "MutableMapping"}
# What `optimizer.name` may be, one row each: a package, the module's file in it, and the class.
OPTIMIZERS = {
    "adamw": ("torch", "optim/adamw.py", "AdamW"),
    "lion": ("leanstep.optimizers", "lion.py", "Lion"),
    "sinkgd": ("leanstep.optimizers.sinkgd", "optimizer.py", "SinkGD"),
    "lanton": ("leanstep.optimizers.lanton", "optimizer.py", "LANTON"),
    "mfac": ("leanstep.optimizers.mfac", "optimizer.py", "MFAC"),
    "muon": ("leanstep.recipes.methods", "muon.py", "MuonAdamW"),
    "sgd": ("torch", "optim/sgd.py", "SGD"),
}
MODEL_CONFIGS = {
    "llama": ("transformers", "models/llama/configuration_llama.py", "LlamaConfig"),
    "gpt2": ("transformers", "models/gpt2/configuration_gpt2.py", "GPT2Config"),
}


@dataclass(frozen=True)
class Accepts:
    """The YAML values that an annotation allows. ``anything`` where the annotation says nothing usable."""

    words: tuple[str, ...] = ()  # of _SIMPLE, "list", "mapping"
    choices: tuple[Any, ...] = ()  # the values of Literal
    item: "Accepts | None" = None  # what the elements of a list must be
    length: int | None = None  # of a tuple
    anything: bool = False

    @classmethod
    def of(cls, annotation: Any) -> "Accepts":
        """From a class, a typing object, source text or an ``ast`` node. Names it does not know allow anything."""
        if not isinstance(annotation, (str, ast.AST)):
            annotation = annotation.__name__ if type(annotation) is type else repr(annotation)
        node = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else annotation
        parts = [cls._of_member(member) for member in _members(node)]
        known = [part for part in parts if part is not None]
        items = [part for part in known if part.item is not None or part.length is not None]
        return cls(
            words=tuple(dict.fromkeys(word for part in known for word in part.words)),
            choices=tuple(choice for part in known for choice in part.choices),
            item=items[0].item if items else None,
            length=items[0].length if items else None,
            anything=not known or any(part.anything for part in known),
        )

    @classmethod
    def _of_member(cls, node: ast.AST) -> "Accepts | None":
        """One member of a union; None for a class that YAML cannot write, such as a tensor."""
        if isinstance(node, ast.Constant) and node.value is None:
            return cls(words=("None",))
        name = _last_name(node.value if isinstance(node, ast.Subscript) else node)
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name in _SIMPLE or name == "NoneType":
            return cls(words=(name.replace("NoneType", "None"),))
        if name == "Literal":
            return cls(choices=tuple(item.value for item in arguments if isinstance(item, ast.Constant)))
        if name == "dtype":
            return cls(choices=DTYPE_NAMES)
        if name in _MAPPINGS or name == "RopeParameters":
            return cls(words=("mapping",))
        if name in _LISTS:
            fixed = name == "tuple" and not any(isinstance(a, ast.Constant) and a.value is ... for a in arguments)
            item = cls.of(arguments[0]) if arguments else None
            return cls(words=("list",), item=item, length=len(arguments) if fixed and arguments else None)
        if name in ("Tensor", "device"):
            return None
        return cls(anything=True)

    def problem(self, value: Any) -> str | None:
        """Say what was expected and what came, or return None when ``value`` is allowed."""
        if self.anything:
            return None
        if isinstance(value, list) and "list" in self.words:
            return self._list_problem(value)
        if _word(value) in self.words or (_word(value) == "int" and "float" in self.words):
            return None
        if any(value == choice and type(value) is type(choice) for choice in self.choices):
            return None
        hint = ""
        if isinstance(value, float) and "int" in self.words and value.is_integer():
            hint = f"; write {value:.0f}"
        elif "str" in self.words and isinstance(value, (bool, int, float)):
            hint = "; put it in quotes"
        return f"expected {self.describe()}, got {_show(value)}{hint}"

    def _list_problem(self, value: list[Any]) -> str | None:
        if self.length is not None and len(value) != self.length:
            return f"expected a list of {self.length}, got {len(value)}: {value!r}"
        for position, element in enumerate(value):
            problem = self.item.problem(element) if self.item else None
            if problem:
                return f"element {position}: {problem}"
        return None

    def describe(self) -> str:
        """In words: ``"one of 'a', 'b', or null"``."""
        parts = [_SIMPLE.get(word, {"list": "a list", "mapping": "a mapping"}.get(word, word)) for word in self.words]
        if "float" in self.words and "int" in self.words:
            parts.remove(_SIMPLE["int"])
        if self.choices:
            parts.insert(0, ("one of " if len(self.choices) > 1 else "") + ", ".join(map(repr, self.choices)))
        return " or ".join(parts)


def optimizer_arguments(name: str) -> dict[str, Accepts] | None:
    """Keyword arguments of the optimizer class a recipe calls ``name``; None when its source is not installed."""
    return _arguments(*OPTIMIZERS[name])


def model_config_fields(family: str) -> dict[str, Accepts] | None:
    """Keys that the transformers configuration of ``family`` takes; None when transformers is not installed."""
    own = _arguments(*MODEL_CONFIGS[family])
    base = _arguments("transformers", "configuration_utils.py", "PreTrainedConfig")
    return None if own is None else {**(base or {}), **own}


def string_constants(package: str, file: str, name: str) -> tuple[str, ...] | None:
    """The strings inside a module-level assignment ``name = ("a", "b")``, or None when there is no such assignment."""
    tree = _tree(package, file)
    for node in tree.body if tree else ():
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            values = (item.value for item in ast.walk(node) if isinstance(item, ast.Constant))
            return tuple(value for value in values if isinstance(value, str))
    return None


def package_folder(package: str) -> Path | None:
    """Where an installed package lies, without importing it (of a dotted name, only the parents are imported)."""
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        return None
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


@lru_cache
def _tree(package: str, file: str) -> ast.Module | None:
    folder = package_folder(package)
    if folder is None or not (folder / file).is_file():
        return None
    return ast.parse((folder / file).read_text(encoding="utf-8"))


@lru_cache
def _arguments(package: str, file: str, class_name: str) -> dict[str, Accepts] | None:
    """Constructor arguments of a class: of ``__init__`` where it has one, its annotated fields otherwise."""
    tree = _tree(package, file)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] if tree else []
    found = next((node for node in classes if node.name == class_name), None)
    if found is None:
        return None
    result: dict[str, Accepts] = {}
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for argument in (*node.args.args[1:], *node.args.kwonlyargs):
                known = argument.annotation is not None
                result[argument.arg] = Accepts.of(argument.annotation) if known else Accepts(anything=True)
        elif isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            result[_last_name(node.target)] = Accepts.of(node.annotation)
    return result


def _members(node: ast.AST) -> Iterator[ast.AST]:
    """The members of ``A | B``, ``Optional[A]`` and ``Union[A, B]``; quoted annotations are opened."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _members(ast.parse(node.value, mode="eval").body)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _members(node.left)
        yield from _members(node.right)
    elif isinstance(node, ast.Subscript) and _last_name(node.value) in ("Optional", "Union"):
        for member in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            yield from _members(member)
        if _last_name(node.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _word(value: Any) -> str:
    """The name under which a YAML value appears in ``Accepts.words``."""
    if value is None:
        return "None"
    return {dict: "mapping", list: "list"}.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    """A value as it appears in an error: YAML's words for null, true and false, text in quotes, long ones cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    text = repr(value)
    kind = {dict: "a mapping ", list: "a list "}.get(type(value), "")
    return kind + (text if len(text) <= 60 else f"{text[:57]}...")
