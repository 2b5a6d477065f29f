"""The process of the program: it defines, and calls what it has defined when it is asked to. Nothing in it is trusted."""

import os
import sys
import types
from typing import Any

import wire


# The program's module, so that what looks classes up by their module finds them. `__main__` it is not: what stands
# under `if __name__ == "__main__":` is no part of the solution.
MODULE = "solution"
MAX_ERROR_CHARACTERS = 300


class Program:
    """The program's module, and those of its objects that the checks know by number only."""

    def __init__(self):
        self.module = types.ModuleType(MODULE)
        self.objects: list[Any] = []
        sys.modules[MODULE] = self.module

    def answer(self, message: list) -> Any:
        """Do what a message asks for and return the JSON form of the result."""
        operation, *operands = message
        if operation == "define":
            exec(compile(operands[0], f"<{MODULE}>", "exec", dont_inherit=True), self.module.__dict__)
            return None
        target = self._target(operands[0])
        if operation == "call":
            args = [wire.decode(form, self.objects.__getitem__) for form in operands[1]]
            kwargs = {name: wire.decode(form, self.objects.__getitem__) for name, form in operands[2].items()}
            result = self._encode(target(*args, **kwargs))
            # What was changed in place shows in the checks, too.
            return [result, [self._encode(one) if isinstance(one, list | dict | set) else None for one in args]]
        if operation == "get":
            return self._encode(getattr(target, operands[1]))
        setattr(target, operands[1], wire.decode(operands[2], self.objects.__getitem__))
        return None

    def _target(self, reference: str | int) -> Any:
        if isinstance(reference, int):
            return self.objects[reference]
        if reference not in self.module.__dict__:
            raise NameError(f"name {reference!r} is not defined")
        return self.module.__dict__[reference]

    def _encode(self, value: Any) -> Any:
        return wire.encode(value, self._keep)

    def _keep(self, value: Any) -> int:
        self.objects.append(value)
        return len(self.objects) - 1


def serve(source_fd: int, reply_fd: int) -> None:
    """Answer messages until there are no more."""
    program = Program()
    while (message := wire.receive(source_fd)) is not None:
        # The program may raise anything, SystemExit and KeyboardInterrupt included; all of it is its failure.
        try:
            reply = ["ok", program.answer(message)]
        except BaseException as error:
            reply = ["error", type(error).__name__, _text(error)]
        wire.send(reply_fd, reply)
    os._exit(0)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MAX_ERROR_CHARACTERS]
    except BaseException:
        # An error of the program's own class, whose text is another error.
        return ""
