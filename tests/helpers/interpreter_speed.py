"""Spare Triton's interpreter work that it repeats for every call of a device function and for every operation.

A call of a device function patches all of `triton.language` again, although the launch around it has done so, and the
look-up of a dtype builds a table of all dtypes each time (Triton 3.9). The results are the same.
"""

import functools
import inspect
from collections.abc import Callable


def spare_repeated_work() -> None:
    """Patch the interpreter of this process; without effect where Triton has none, or one that is built otherwise."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_per_launch(interpreter._patch_lang, (language, language.core))
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _once_per_launch(patch: Callable, modules: tuple) -> Callable:
    """Let only the launch of a kernel patch the modules that its function sees, and no call of a device function.

    Only a launch restores what it patched, when it is over; a call of a device function drops the scope.
    """
    patched: set[int] = set()

    @functools.cache
    def visible(globals_id: int, function: Callable) -> frozenset[int]:
        values = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(id(module) for module in modules if any(module is value for value in values))

    def patch_once(function: Callable):
        names = visible(id(function.__globals__), function)
        if patched:
            return None if names <= patched else patch(function)
        scope = patch(function)
        patched.update(names)
        restore = scope.restore

        def end() -> None:
            patched.clear()
            restore()

        scope.restore = end
        return scope

    return patch_once


def _remembered(lookup: Callable) -> Callable:
    """Remember the answer per dtype, by its name: dtypes of one name are equal."""
    answers: dict[str, object] = {}

    def look_up(dtype):
        name = dtype.name
        if name not in answers:
            answers[name] = lookup(dtype)
        return answers[name]

    return look_up
