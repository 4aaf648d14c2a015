"""A nested value goes in, its arrays come out in a fixed order, each with a name; arrays go in, the nested value comes out."""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.contracts import RESERVED_INPUT_NAMES
from input_workers.errors import SpecMismatch
from input_workers.sources.columns import as_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Structure"]

# How deep values may be nested: one that holds itself would be so without an end.
MAX_DEPTH = 32


class Structure:
    """How arrays are nested in tuples, lists, namedtuples, mappings and dataclasses. Learnt from a first value, then fixed.

    None holds no array and stays None. Everything else is a leaf: a NumPy array or scalar, a Python number (int64, float64,
    bool, complex128), or what has `__array__`, such as a tensor in host memory. A value may be a leaf itself.

    Names are identifiers that `init_data_input_workers` takes, in the order of the leaves: keys and fields as they are,
    places as `item_0`, joined by `_`: `{"image": ..., "target": {"boxes": ...}}` has `image` and `target_boxes`. The same
    value has the same names in every process. Thread-safe, and can be pickled if the types of the value can.

    Args:
        value: the first value.
        what: what it is called in errors, such as "the first item of train_set".

    Raises:
        SpecMismatch: it holds no array, or something that is none; with the path, got and wanted.
    """

    __slots__ = ("_root", "names")

    def __init__(self, value: Any, what: str = "the first value") -> None:
        leaves: list[tuple[str, ...]] = []
        self._root = _Node(value, (), what, leaves)
        if not leaves:
            raise SpecMismatch(f"{what}: got {_kind(value)}, which holds no array; wanted at least one")
        self.names: tuple[str, ...] = tuple(_unique(map(_name_of, leaves)))

    def flatten(self, value: Any, what: str) -> list[NDArray[Any]]:
        """Return the arrays of a value that is nested as the first one was, in the order of `names`.

        Args:
            value: of the same structure; its arrays may have any dtype and shape. Mappings may have another order.
            what: what it is called in errors, such as "item 7 of train_set".

        Raises:
            SpecMismatch: it is nested in another way, or has something that is no array; with the path, got and wanted.
        """
        leaves: list[NDArray[Any]] = []
        self._root.take_apart(value, (), what, leaves)
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return a value of this structure with these leaves, which may be anything, in the order of `names`."""
        if len(leaves) != len(self.names):
            raise SpecMismatch(f"got {len(leaves)} leaves; wanted {len(self.names)}, for {list(self.names)}")
        return self._root.put_together(iter(leaves))


class _Node:
    """A place in the structure: its parts by key, or a leaf, or None."""

    __slots__ = ("is_leaf", "keys", "kind", "parts")

    def __init__(self, value: Any, path: tuple[str, ...], what: str, leaves: list[tuple[str, ...]]) -> None:
        if len(path) > MAX_DEPTH:
            raise SpecMismatch(f"{what}{''.join(path)}: nested deeper than {MAX_DEPTH}; wanted arrays")
        self.kind = type(value)
        parts = _parts(value)
        self.is_leaf = parts is None and value is not None
        if self.is_leaf:
            _array(value, path, what)
            leaves.append(path)
        self.keys: tuple[Any, ...] = tuple(parts or ())
        self.parts = [_Node(part, (*path, _step(value, key)), what, leaves) for key, part in (parts or {}).items()]

    def take_apart(self, value: Any, path: tuple[str, ...], what: str, leaves: list[NDArray[Any]]) -> None:
        if self.is_leaf:
            leaves.append(_array(value, path, what))
            return
        parts = _parts(value)
        if type(value) is not self.kind or parts is None or parts.keys() != set(self.keys):
            if type(value) is self.kind is type(None):
                return
            wanted = f"{self.kind.__qualname__} with {list(self.keys)}" if self.keys else "None or nothing in it"
            raise SpecMismatch(
                f"{what}{''.join(path)}: got {_kind(value)}; wanted {wanted}, as in the first one: the structure may not change"
            )
        for key, node in zip(self.keys, self.parts, strict=True):
            node.take_apart(parts[key], (*path, _step(value, key)), what, leaves)

    def put_together(self, leaves: Any) -> Any:
        if self.is_leaf:
            return next(leaves)
        parts = [node.put_together(leaves) for node in self.parts]
        return None if self.kind is type(None) else _maker(self.kind)(self.keys, parts)


def _parts(value: Any) -> dict[Any, Any] | None:
    """Return what a container holds, by key, field or place; None of what is no container."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return None


def _maker(kind: type[Any]) -> Callable[[tuple[Any, ...], list[Any]], Any]:
    """Return what makes a container of this type from keys and parts; of a mapping that needs more than those, a dict."""
    if issubclass(kind, Mapping):
        return lambda keys, parts: _mapping(kind, dict(zip(keys, parts, strict=True)))
    if hasattr(kind, "_make"):
        return lambda _, parts: kind._make(parts)
    if issubclass(kind, (tuple, list)):
        return lambda _, parts: kind(parts)
    return lambda keys, parts: kind(**dict(zip(keys, parts, strict=True)))


def _mapping(kind: type[Any], content: dict[Any, Any]) -> Any:
    if kind is dict:
        return content
    try:
        return kind(content)
    except TypeError:  # a defaultdict, say
        return content


def _array(value: Any, path: tuple[str, ...], what: str) -> NDArray[Any]:
    try:
        return as_array(value)
    except SpecMismatch as error:
        raise SpecMismatch(f"{what}{''.join(path)}: {error}") from error


def _step(value: Any, key: Any) -> str:
    """Return how a part is written in Python."""
    return f"[{key!r}]" if isinstance(value, Mapping) or not isinstance(key, str) else f".{key}"


def _kind(value: Any) -> str:
    """Return what a value is, for errors."""
    parts = _parts(value)
    if parts is None:
        return "None" if value is None else type(value).__qualname__
    return f"{type(value).__qualname__} with {list(parts)}" if parts else f"an empty {type(value).__qualname__}"


def _name_of(path: tuple[str, ...]) -> str:
    """Return the name of the leaf at a path."""
    words = []
    for step in path:
        word = re.sub(r"\W+", "_", step, flags=re.ASCII).strip("_")
        words.append(f"item_{word}" if word.isdecimal() else word)
    name = "_".join(filter(None, words)) or "item"
    if name[0].isdecimal():
        name = f"item_{name}"
    return f"{name}_" if keyword.iskeyword(name) or name in RESERVED_INPUT_NAMES else name


def _unique(names: Iterable[str]) -> Iterable[str]:
    """Number names that are there already."""
    used: set[str] = set()
    for name in names:
        number, other = 2, name
        while other in used:
            other, number = f"{name}_{number}", number + 1
        used.add(other)
        yield other
