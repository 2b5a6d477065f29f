"""
The process of the checks: it runs the tests, and asks the process of the program for every call of what is tested.

The program never sees the tests, nor anything of the process that judges it. It can only answer calls, and the answers
are compared here, as plain data.
"""

import ast
import builtins
import importlib
import sys
from typing import Any

import wire


PASSED, FAILED, BAD_TESTS = "passed", "failed", "bad tests"
MAX_REASON_CHARACTERS = 500


class ProgramEnded(BaseException):
    """The program's process has gone or talks nonsense. No `except Exception` of a test catches it."""


class ProgramError(RuntimeError):
    """The program raised what is no built-in exception."""


class Channel:
    """The way to the program's process, and whether it still holds."""

    def __init__(self, send_fd: int, receive_fd: int):
        self.send_fd, self.receive_fd = send_fd, receive_fd
        self.is_broken = False

    def ask(self, *message: Any) -> Any:
        """
        Send a message and return the reply's form.

        Raises:
            ProgramEnded: if there is none.
            Exception: the program's own, by its name.
        """
        if self.is_broken:
            raise ProgramEnded("the program ended early")
        try:
            wire.send(self.send_fd, list(message))
            reply = wire.receive(self.receive_fd)
            if reply is None:
                raise BrokenPipeError
            kind, *content = reply
            if kind == "ok":
                return content[0]
            name, text = map(str, content)
        except (OSError, TypeError, ValueError, IndexError, wire.WireError) as error:
            self.is_broken = True
            reason = "the program ended early" if isinstance(error, OSError) else f"the program's answer: {error}"
            raise ProgramEnded(reason) from error
        raise _exception(name, text)

    def value(self, form: Any) -> Any:
        """Return the value of a form that the program sent."""
        try:
            return wire.decode(form, lambda number: Remote(number, self))
        except (wire.WireError, RecursionError) as error:
            self.is_broken = True
            raise ProgramEnded(f"the program's answer: {error}") from error


class Remote:
    """
    Something that lives in the program's process: a global of that name, or an object of that number.

    It can be called, its attributes can be read and set. In all else it is an object equal to itself alone: what the
    program says of its own objects is not believed.
    """

    __slots__ = ("_reference", "_channel")

    def __init__(self, reference: str | int, channel: Channel):
        object.__setattr__(self, "_reference", reference)
        object.__setattr__(self, "_channel", channel)

    def __call__(self, *args, **kwargs):
        channel = self._channel
        forms = [wire.encode(value, _number) for value in args]
        named = {name: wire.encode(value, _number) for name, value in kwargs.items()}
        reply = channel.ask("call", self._reference, forms, named)
        try:
            result, changed = reply
            pairs = list(zip(args, changed, strict=True))
        except (TypeError, ValueError) as error:
            channel.is_broken = True
            raise ProgramEnded("the program's answer to a call is none") from error
        for value, form in pairs:
            if isinstance(value, list | dict | set) and form is not None:
                _change(value, channel.value(form))
        return channel.value(result)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel.value(self._channel.ask("get", self._reference, name))

    def __setattr__(self, name: str, value: Any):
        self._channel.ask("set", self._reference, name, wire.encode(value, _number))


def check(request: dict[str, Any], channel: Channel) -> tuple[str, str]:
    """
    Run the tests of a request against its program.

    Args:
        request (`dict`):
            `program`, `tests` and `prelude` (Python), and `targets`, names that the tests take from the program even
            if the prelude binds them.
        channel ([`Channel`]):
            Way to the program's process, which has defined nothing yet.

    Returns:
        `tuple[str, str]`: verdict and reason.
    """
    try:
        tree = ast.parse(request["tests"])
        prelude = compile(request["prelude"], "<prelude>", "exec", dont_inherit=True)
        tests = compile(tree, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return BAD_TESTS, _reason(error)
    # Whatever the program or a test raises, SystemExit included, is a failure and nothing more.
    try:
        channel.ask("define", request["program"])
    except BaseException as error:
        return FAILED, _reason(error)
    try:
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(prelude, namespace)
        for name in request["targets"]:
            namespace[name] = Remote(name, channel)
        for name in free_names(tree) - namespace.keys():
            namespace[name] = _module(name, tree) or Remote(name, channel)
        exec(tests, namespace)
    except BaseException as error:
        return FAILED, _reason(error)
    # A test with a bare `except:` goes on without the program.
    return (FAILED, "the program ended early") if channel.is_broken else (PASSED, "")


def free_names(tree: ast.AST) -> set[str]:
    """Names that tests read and that are not built in, which a program may not stand in for."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {name for name in names if not hasattr(builtins, name) and not name.startswith("__")}


def _module(name: str, tree: ast.AST) -> Any | None:
    """A module of the standard library that tests use without importing it: never the program's stand-in for it."""
    is_called = any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        for node in ast.walk(tree)
    )
    if is_called or name not in sys.stdlib_module_names:
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def _number(value: Any) -> int:
    if type(value) is Remote and isinstance(value._reference, int):
        return value._reference
    raise TypeError(f"a {type(value).__name__} cannot be passed to the program")


def _change(value: Any, new: Any) -> None:
    if isinstance(value, list):
        value[:] = new
    else:
        value.clear()
        value.update(new)


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    is_usual = isinstance(kind, type) and issubclass(kind, Exception)
    # StopIteration would quietly end a loop over several calls: the tests behind it would not be run.
    if not is_usual or issubclass(kind, StopIteration | StopAsyncIteration):
        return ProgramError(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:
        return ProgramError(f"{name}: {text}")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]
