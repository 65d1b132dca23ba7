"""Options by layer and query head: a JSON file, or the same as dicts.

    {"*": {"*": {"method": "minference"}, "7": {"vertical": 3500, "slash": 100}}, "0": {"*": {"keep": "all"}}}

The first key is a layer, the second a query head, "*" every one. What a layer says overrides what "*" says, and within
either what a head says overrides its "*". The same file serves the llama.cpp plug-in (docs/llama.cpp.md).
"""

import json
import os
import typing

from . import _core

Value = float | int | str | None  # of an option; None is the method's own
HeadChanges = typing.Mapping[str | int, typing.Mapping[str, Value]]  # options of query heads, by head or "*"

EVERY = "*"
_CALLERS = ("precision", "scale")  # options that a head's method leaves as the caller has them, unless it names them


def shown(text: str) -> str:
    """As the library's messages show what came: its first 64 bytes, on one line."""
    start = text.encode(errors="replace")[:64].decode(errors="ignore")
    return "".join("?" if ord(c) < 0x20 or ord(c) == 0x7F else c for c in start)


def _by_index(given: typing.Any, what: str, place: str) -> dict[int | None, list[typing.Any]]:
    """A mapping whose keys are numbers or "*": {None or index: value}, that of "*" first."""
    if not isinstance(given, dict):
        raise ValueError(
            f'{place or "settings"}: {given!r} is not an object of {what}s; write {{"*": ...}} for every {what}'
        )
    found: dict[int | None, list[typing.Any]] = {}
    for key, value in given.items():
        text = str(key)
        if text != EVERY and not (text.isascii() and text.isdecimal()):
            raise ValueError(f'{place}{what} "{shown(text)}": not a number from 0 up, nor "*" for every one')
        found.setdefault(None if text == EVERY else int(text), []).append(value)
    return dict(sorted(found.items(), key=lambda item: -1 if item[0] is None else item[0]))


def _names(method: Value, name: str) -> bool:
    return f":{name}=" in str(method)


def _callers(base: typing.Mapping[str, Value], name: str) -> Value:
    """An option as the caller has it, by itself or in the text of a method; None is the method's own."""
    method = base.get("method")
    if base.get(name) is None and isinstance(method, str) and _names(method, name):
        return _core.options(method).as_dict()[name]
    return base.get(name)


def _over(base: typing.Mapping[str, Value], changes: typing.Mapping[str, Value]) -> dict[str, Value]:
    if "method" in changes:
        kept = {name: _callers(base, name) for name in _CALLERS if not _names(changes["method"], name)}
        base = {name: value for name, value in kept.items() if value is not None}
    return {**base, **changes}


def _options(options: typing.Mapping[str, typing.Any], place: str) -> _core.Options:
    """The library's options of a dict with "method"; raises what is wrong with a name or a value, and where it stands."""
    for name, value in options.items():
        for text in (name, value):
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f'{place}"{shown(text)}" contains a NUL character, which no option has; take it out')
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, str))):
            raise ValueError(f"{place}{name} {value!r}: neither a number nor a name")
    try:
        return _core.options(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}{error}") from None


def library_options(heads: list[dict[str, Value]], place: str = "") -> list[_core.Options]:
    """The library's options of all heads, or of each, from a list of dicts with "method"; raises what is wrong with them."""
    made = []
    for h, options in enumerate(heads):
        where = f"{place}head {h}: " if len(heads) > 1 else place
        made.append(_options(options, where))
        try:
            # The reference takes whatever one of the devices takes.
            _core.Plan(made[-1], "reference", 0, 1, (1, 1, 1, 1, 1, 64, 0))
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
    return made


class Heads:
    """Options of the query heads of one layer, from {"head or *": {"option": value}}."""

    def __init__(self, given: HeadChanges, place: str = "") -> None:
        self._place = place
        self._changes: dict[int | None, dict[str, Value]] = {}
        for head, all_changes in _by_index(given, "head", place).items():
            where = f"{place}head {EVERY if head is None else head}: "
            for changes in all_changes:
                if not isinstance(changes, dict):
                    raise ValueError(f"{where}{changes!r} is not an object of options")
                _options({"method": "pbs", **changes}, where)
                self._changes[head] = _over(self._changes.get(head, {}), changes)

    def over(self, base: list[dict[str, Value]], q_heads: int) -> list[dict[str, Value]]:
        """`base` with what the heads change: a list of dicts with "method", one for all heads or one of each."""
        made = list(base)
        for head, changes in self._changes.items():
            if head is not None and head >= q_heads:
                raise ValueError(f"{self._place}head {head}: there are {q_heads} query heads, 0 .. {q_heads - 1}")
            if head is not None and len(made) == 1:
                made *= q_heads
            for h in range(len(made)) if head is None else (head,):
                made[h] = _over(made[h], changes)
        return made


def read_settings(path: str | os.PathLike[str]) -> typing.Any:
    """What a file of settings by layer and query head says, unchecked. Raises OSError, or ValueError for what is no JSON."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: not JSON: {error}") from None


class Layers:
    """The same of each layer, from a dict, which messages call `name`, or the path of a JSON file."""

    def __init__(self, source: str | os.PathLike[str] | typing.Mapping[str | int, HeadChanges], name: str = "") -> None:
        self._file = name and f"{name}: "
        if isinstance(source, (str, os.PathLike)):
            self._file = f"{os.fspath(source)}: "
            source = read_settings(source)
        self._heads = {
            layer: [Heads(heads, self._place(layer)) for heads in all_heads]
            for layer, all_heads in _by_index(source, "layer", self._file).items()
        }

    def _place(self, layer: int | None) -> str:
        return f"{self._file}layer {EVERY if layer is None else layer}, "

    def check(self, layers: set[int]) -> None:
        """Raises if a layer is named that is not among `layers`."""
        for layer in self._heads:
            if layer is not None and layer not in layers:
                raise ValueError(f"{self._file}layer {layer}: no such layer; there are {min(layers)} .. {max(layers)}")

    def over(self, layer: int, base: list[dict[str, Value]], q_heads: int) -> list[dict[str, Value]]:
        """A layer's options over `base`, both as Heads.over() has them."""
        made = base
        for each in (None, layer):
            for heads in self._heads.get(each, ()):
                made = heads.over(made, q_heads)
        return made

    def of(self, layer: int, base: dict[str, Value] | list[dict[str, Value]], q_heads: int) -> list[dict[str, Value]]:
        """The same, checked."""
        made = self.over(layer, [base] if isinstance(base, dict) else base, q_heads)
        place = f"{self._file}layer {layer}, "
        options = library_options(made, place)
        if len(made) > 1:
            try:
                _core.Plan(options, "reference", 0, 1, (1, q_heads, q_heads, 1, 1, 64, 0))
            except ValueError as error:
                raise ValueError(f"{place}{error}") from None
        return made
