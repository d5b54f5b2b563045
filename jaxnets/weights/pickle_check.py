"""The pickle in a PyTorch file, checked before PyTorch reads it: it may hold only plain values and tensors.

PyTorch's `weights_only=True` runs no code, but can still be made to fill the memory, to loop forever and to
overflow the stack: by `bytearray(10**10)`, by nested tuples as a key, by one long list copied many times.
A state_dict needs none of that.
"""

import pickletools
from typing import Any, BinaryIO

from jaxnets.errors import UserError

MAX_OPCODES = 500_000  # a state_dict has about 40 per entry; PyTorch reads a million per second
MAX_BYTES = 1 << 24
SCALARS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"
}  # fmt: skip
EMPTY = {"EMPTY_TUPLE": "empty tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What may be called, and the kind of its result.
CALLABLE = {
    "collections OrderedDict": "ordered dict",
    "collections Counter": "counter",  # the milestones of a schedule
    "torch._utils _rebuild_tensor": "tensor",  # files of 2017
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "tensor",
    "torch.nn.parameter Parameter": "parameter",  # files of 2017
}
STORAGES = {
    f"{module} {kind}Storage"
    for module in ("torch", "torch.cuda")
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}


def check(file: BinaryIO) -> None:
    """Go through one pickle, from the position of `file` to its end, without building anything from it.

    Raises UserError for one that holds more than containers, plain values and tensors, ValueError for a damaged one.
    """
    stack: list[str] = []  # the kinds of what would be on the pickle's own stack
    marks: list[int] = []
    memo: dict[int, str] = {}
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
            if count > MAX_OPCODES or (position or 0) > MAX_BYTES:
                raise UserError("its pickle is far too long for a state_dict")
            _follow(opcode.name, argument, stack, marks, memo)
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle is damaged") from error


def _follow(opcode: str, argument: Any, stack: list[str], marks: list[int], memo: dict[int, str]) -> None:
    """Apply one instruction to the kinds on the stack; UserError for what no state_dict needs."""
    if opcode in SCALARS:
        stack.append("scalar")
    elif opcode in EMPTY:
        stack.append(EMPTY[opcode])
    elif opcode == "GLOBAL":
        if argument not in CALLABLE and argument not in STORAGES:
            raise UserError(f"it holds {argument.replace(' ', '.')}")
        stack.append(argument)
    elif opcode == "MARK":
        marks.append(len(stack))
    elif opcode in TUPLES:
        stack.append(_tuple_of(_pop(stack, len(stack) - TUPLES[opcode])))
    elif opcode == "TUPLE":
        stack.append(_tuple_of(_pop(stack, marks.pop())))
    elif opcode in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif opcode in ("BINPUT", "LONG_BINPUT"):
        # What comes back from the memo is no longer of a kind that may be copied.
        memo[argument] = stack[-1] if stack[-1] in {"scalar", *CALLABLE, *STORAGES} else "shared"
    elif opcode in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
        _fill(opcode, stack, marks)
    elif opcode == "BINPERSID":
        _require(stack.pop(), "tuple of scalars")
        stack.append("storage")
    elif opcode in ("REDUCE", "BUILD"):
        _call(opcode, stack)
    elif opcode not in ("PROTO", "STOP"):
        raise UserError(f"its pickle uses {opcode}, which no state_dict does")


def _pop(stack: list[str], start: int) -> list[str]:
    if not 0 <= start <= len(stack):
        raise IndexError
    items = stack[start:]
    del stack[start:]
    return items


def _tuple_of(kinds: list[str]) -> str:
    if kinds == ["dict"]:
        return "tuple of a dict"
    # Flat, so that it can be looked up: nested tuples of two or more would take forever to hash.
    return "tuple of scalars" if all(kind == "scalar" or kind in STORAGES for kind in kinds) else "tuple"


def _require(kind: str, *kinds: str) -> None:
    if kind not in kinds:
        raise UserError(f"its pickle has a {kind} instead of a {' or '.join(kinds)}")


def _fill(opcode: str, stack: list[str], marks: list[int]) -> None:
    """Add to a list or a dict, whose keys must be plain values."""
    if opcode in ("APPEND", "APPENDS"):
        _pop(stack, len(stack) - 1 if opcode == "APPEND" else marks.pop())
        return
    items = _pop(stack, len(stack) - 2 if opcode == "SETITEM" else marks.pop())
    for key in items[::2]:
        _require(key, "scalar")


def _call(opcode: str, stack: list[str]) -> None:
    """Make a tensor or an ordered dict from arguments, or give the latter attributes, such as `_metadata`."""
    argument, target = stack.pop(), stack.pop()
    if opcode == "BUILD":
        _require(target, "ordered dict", "parameter")
        _require(argument, "dict" if target == "ordered dict" else "tuple")
        stack.append(target)
        return
    _require(target, *CALLABLE)
    # A dict made from items copies them, as often as the file asks; so they must have just been made.
    arguments = {"collections OrderedDict": ("empty tuple",), "collections Counter": ("tuple of a dict", "empty tuple")}
    _require(argument, *arguments.get(target, ("tuple", "tuple of scalars")))
    stack.append(CALLABLE[target])
