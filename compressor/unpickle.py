"""A pickle machine that imports nothing and runs nothing: pickles as data.

A pickle is a program for a small stack machine, with two dangerous instructions: import a name, and call it. Here
an imported name becomes a `Global`, which is only its text; calling one gives a `Record` of name and arguments,
unless the machine was handed a harmless function of ours for that name. No class, no code and no library that
the pickle names is touched, and what calls may copy is bounded by the size of the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

_MAX_STEPS = 50_000_000  # instructions of one pickle: minutes
_COPIES = 16  # bytes or items that calls may copy, per byte of the file: a real file copies each once
_MAX_KEY_DEPTH = 16  # of a tuple used as a key: hashing recurses in C
_ALIASES = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy.core": "numpy._core"}
_PUSH = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "FLOAT", "BINFLOAT",
])  # fmt: skip
_NEW: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
# calls that only pass on another call: name -> (what is called, its arguments)
_FORWARD: Mapping[str, Callable[..., tuple[Any, Any]]] = {
    "copyreg.__newobj__": lambda kind, *args: (kind, args),
    "torch._tensor._rebuild_from_type": lambda function, kind, args, *state: (function, args),
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, *state: (function, args),
}


class Malformed(Exception):
    """The bytes are no pickle that any writer makes."""


class Stream(Protocol):
    """Where a pickle is read from; a read beyond the end gives what is there, and reserves no more."""

    def read(self, size: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...
    def seek(self, offset: int, /) -> Any: ...


@dataclass(frozen=True)
class Global:
    """A name that the pickle would have imported: `torch.nn.modules.conv.Conv2d`."""

    path: str


@dataclass(eq=False)
class Record:
    """An object that the pickle would have built: what it would have called, with what, and the state given to it."""

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """The instance dictionary that the object would have had."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


class Machine:
    """The stack machine, one method an instruction; `size` is the file's, in bytes.

    calls: path of a global -> what to do in its place. persistent: what stands outside of the pickle, by its token.
    """

    def __init__(
        self, calls: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any], size: int
    ) -> None:
        self.calls = calls
        self.persistent = persistent
        self.copies = _COPIES * (size + 4096)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Stream) -> Any:
        """Execute one pickle from `stream`, which is left just behind it; answer what it describes."""
        for step, (opcode, arg, _) in enumerate(pickletools.genops(cast(Any, stream))):
            name = opcode.name
            if step > _MAX_STEPS:
                raise Malformed("it has too many instructions")
            if name in _PUSH:
                self.stack.append(arg)
            elif name in _NEW:
                self.stack.append(_NEW[name]())
            elif name == "STOP":
                return self.stack.pop()
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"do_{name.lower()}", self._unknown)(arg)
        raise Malformed("it is cut short")

    def _unknown(self, arg: Any) -> None:
        raise Malformed("it uses an instruction that no checkpoint uses")

    def _pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # ---- the stack ----

    def do_mark(self, arg: Any) -> None:
        self.marks.append(len(self.stack))

    def do_pop(self, arg: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def do_pop_mark(self, arg: Any) -> None:
        self._pop_to_mark()

    def do_dup(self, arg: Any) -> None:
        self.stack.append(self.stack[-1])

    def do_put(self, arg: int) -> None:
        self.memo[arg] = self.stack[-1]

    def do_get(self, arg: int) -> None:
        self.stack.append(self.memo[arg])

    def do_memoize(self, arg: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    do_binput = do_long_binput = do_put
    do_binget = do_long_binget = do_get

    # ---- containers ----

    def do_bytearray8(self, arg: Any) -> None:
        self.stack.append(bytes(arg))

    def do_tuple(self, arg: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def do_tuple1(self, arg: Any) -> None:
        self._tuple(1)

    def do_tuple2(self, arg: Any) -> None:
        self._tuple(2)

    def do_tuple3(self, arg: Any) -> None:
        self._tuple(3)

    def _tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) != size:
            raise Malformed("its stack is empty")
        self.stack[-size:] = [items]

    def do_list(self, arg: Any) -> None:
        self.stack.append(self._pop_to_mark())

    def do_frozenset(self, arg: Any) -> None:
        self.stack.append({as_key(item) for item in self._pop_to_mark()})

    def do_dict(self, arg: Any) -> None:
        items = self._pop_to_mark()
        self.stack.append({})
        self._set(items)

    def do_setitem(self, arg: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def do_setitems(self, arg: Any) -> None:
        self._set(self._pop_to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Record) else target
        if not isinstance(entries, dict) or len(items) % 2:
            raise Malformed(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[as_key(key)] = value

    def do_append(self, arg: Any) -> None:
        self._extend([self.stack.pop()])

    def do_appends(self, arg: Any) -> None:
        self._extend(self._pop_to_mark())

    def do_additems(self, arg: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(as_key(item) for item in items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise Malformed(f"it appends to a {type(target).__name__}")

    # ---- names, calls, objects ----

    def do_global(self, arg: str) -> None:
        module, name = arg.split(" ", 1)
        self.stack.append(_name(module, name))

    def do_stack_global(self, arg: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_name(module, name))

    def do_reduce(self, arg: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._call(function, args)

    do_newobj = do_reduce

    def do_newobj_ex(self, arg: Any) -> None:
        keywords, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._call(kind, (*args, keywords))

    def do_inst(self, arg: str) -> None:
        module, name = arg.split(" ", 1)
        self._call(_name(module, name), tuple(self._pop_to_mark()))

    def do_obj(self, arg: Any) -> None:
        kind, *args = self._pop_to_mark()
        self._call(kind, tuple(args))

    def _call(self, function: Any, args: Any) -> None:
        """Push what our own function of that name makes, or else only the memory of the call."""
        path = function.path if isinstance(function, (Global, Record)) else type(function).__name__
        while isinstance(function, Global) and path in _FORWARD and isinstance(args, tuple):
            function, args = _FORWARD[path](*args)
            path = function.path if isinstance(function, Global) else type(function).__name__
        if not isinstance(args, tuple):
            raise Malformed(f"it calls {path} without arguments")
        self.copies -= sum(len(item) for item in args if isinstance(item, (bytes, str, list, dict, set)))
        if self.copies < 0:
            raise Malformed("it copies the same data over and over")
        known = self.calls.get(path) if isinstance(function, Global) else None
        self.stack.append(known(*args) if known else Record(path, args))

    def do_build(self, arg: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def do_persid(self, arg: Any) -> None:
        self.stack.append(self.persistent(arg))

    def do_binpersid(self, arg: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _name(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Malformed("it imports something that is no name")
    for old, new in _ALIASES.items():
        if module == old or module.startswith(old + "."):
            module = new + module.removeprefix(old)
    return Global(f"{module}.{name}")


def as_key(value: Any, depth: int = 0) -> Any:
    """`value` as a key of a dict or member of a set; raises Malformed for what cannot be one."""
    if isinstance(value, tuple):
        if depth > _MAX_KEY_DEPTH:
            raise Malformed("a key in it is nested too deep")
        return tuple(as_key(item, depth + 1) for item in value)
    if isinstance(value, (set, dict, list)):
        raise Malformed(f"a key in it is a {type(value).__name__}")
    return value
