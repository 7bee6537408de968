"""Triton's interpreter in half the time, and with every NumPy."""

import contextlib
import functools
import inspect

__all__ = ["patch_interpreter"]


def patch_interpreter() -> None:
    """Change what the interpreter of Triton is slow at or fails at. Does nothing with a Triton that has none, or is built otherwise."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    for change in (_replace_once_a_launch, _index_with_one_element):
        with contextlib.suppress(AttributeError):
            change(interpreter)


def _replace_once_a_launch(interpreter) -> None:
    """Let it put its functions in place of those of `triton.language` once a launch.

    It does so before every call of a device function, too, and searches the whole language for what there is to replace, which is half
    of the time of interpreted kernels. All is replaced by then, unless the function sees modules of the language that the kernel does
    not.
    """
    patch, call, scope = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope
    language, replaced = {id(interpreter.tl), id(interpreter.tl.core)}, set()

    @functools.cache
    def modules(fn):
        return language & {id(value) for value in fn.__globals__.values() if inspect.ismodule(value)}

    def patch_once(fn):
        missing = modules(fn) - replaced
        replaced.update(missing)
        return patch(fn) if missing else scope()

    def launch(self, *arguments, **options):
        replaced.clear()
        return call(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


def _index_with_one_element(interpreter) -> None:
    """Let scalars be indices: Triton 3.6 converts their arrays of one element by `int`, which NumPy 2.4 no longer does."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor
