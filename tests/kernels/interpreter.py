"""Interpreted kernels in half the time."""

import functools
import inspect

__all__ = ["patch_once_a_launch"]


def patch_once_a_launch() -> None:
    """Let Triton's interpreter put its functions in place of those of `triton.language` once a launch.

    It does so before every call of a device function, too, and searches the whole language for what there is to replace, which is half
    of the time of interpreted kernels. All is replaced by then, unless the function sees modules of the language that the kernel does
    not. Does nothing with a Triton whose interpreter is built otherwise.
    """
    try:
        from triton.runtime import interpreter

        patch, call, scope = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return
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
