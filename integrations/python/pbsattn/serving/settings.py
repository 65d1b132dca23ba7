"""What a server's plug-in is told: environment variables, or one JSON file that they go over. Checked when it is read.

    PBSATTN_METHOD=pbs:top_p=0.95 PBSATTN_MIN_TOKENS=4096 vllm serve ...
    PBSATTN_CONFIG=pbsattn.json vllm serve ...        # {"top_p": 0.95, "settings": {"0": {"*": {"keep": "all"}}}}

Servers hand a plug-in no options, and start their workers with their own environment.
"""

import dataclasses
import json
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping

import pbsattn

Value = float | int | str
Change = tuple[int | None, int | None, dict[str, Value]]  # layer, query head (None is every one), options

LEAVE = "leave"  # to FlashAttention what pbsattn can't be used for
REFUSE = "refuse"  # the server's start, for the same
EVERY = "*"
PREFIX = "PBSATTN_"
MODELS_OWN = ("scale", "softcap", "window")  # options that a model's layers bring
LEARNED = "auto:permutation=learned:order_scope=kv_head"  # what `auto` stands for with the file of a learned order
_FLAGS = {"1": True, "0": False, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How layers and rows are taken. Made by `read`."""

    method: str = "auto"  # a method's text, with options
    min_tokens: int = 2560  # least tokens of a row
    changes: tuple[Change, ...] = ()  # options by layer and global query head, later ones over earlier ones
    layers: frozenset[int] | None = None  # whose index is among them; None takes all
    memory: int = 2 << 30  # bytes that workspace and gathered pages may take
    unsupported: str = LEAVE  # or REFUSE: what a layer, a version or settings that can't be used bring about
    over_flash_attn: bool = False  # stand in for vLLM's FLASH_ATTN too
    learned: pbsattn.LearnedOrder | None = None  # the weights of permutation=learned, and settings that `auto` goes by
    stats: bool = False  # log density and time of each row by layer; waits for each layer

    def head_options(self, layer: int, first_head: int, heads: int) -> list[dict[str, Value]]:
        """The options, with "method", of the query heads first_head .. first_head + heads - 1 of a layer."""

        def over(made: list[dict[str, Value]], every: tuple[Change, ...]) -> list[dict[str, Value]]:
            made = list(made)
            for of_layer, of_head, changes in every:
                if of_layer in (None, layer):
                    for h in range(heads):
                        if of_head in (None, first_head + h):
                            made[h] = dict(changes) if "method" in changes else {**made[h], **changes}
            return made

        if self.learned is None or self.method.partition(":")[0] != "auto":
            return over([{"method": self.method}] * heads, self.changes)
        # The file's settings go over the method's own, what the method's text names over those.
        values, named = pbsattn.options(self.method), [part.partition("=")[0] for part in self.method.split(":")[1:]]
        of_file = over([{"method": LEARNED}] * heads, changes_of(self.learned.settings))
        return over([{**each, **{name: values[name] for name in named}} for each in of_file], self.changes)

    def check_model(self, layers: int, heads: int, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError where settings or the learned order are another model's than one of these sizes: they name a
        layer or head that it hasn't, or the file's sizes are others."""
        if self.learned is not None:
            self.learned.require_model(layers=layers, query_heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for of_layer, of_head, _ in self.changes:
            for what, index, count in (("layer", of_layer, layers), ("head", of_head, heads)):
                if index is not None and index >= count:
                    raise ValueError(f"settings of {what} {index}: the model has {count}, 0 .. {count - 1}")
        if unknown := sorted(layer for layer in self.layers or () if layer >= layers):
            raise ValueError(f"layers {unknown}: the model has {layers}, 0 .. {layers - 1}")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "".join(c if c.isprintable() else "?" for c in text[:64])


def _whole(value: object, least: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'"{_shown(value)}": not a whole number from {least} up')
    return value


def _flag(value: object) -> bool:
    found = value if isinstance(value, bool) else _FLAGS.get(str(value).lower())
    if found is None:
        raise ValueError(f'"{_shown(value)}": neither 0 nor 1')
    return found


def _unsupported(value: object) -> str:
    if value not in (LEAVE, REFUSE):
        raise ValueError(f'"{_shown(value)}": neither "{LEAVE}" (to FlashAttention) nor "{REFUSE}" (to start)')
    return str(value)


def _layers(value: object) -> frozenset[int]:
    """Indices: a list of them, or text as "0-3,7"."""
    parts: Iterable[object] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    found: set[int] = set()
    for part in parts:
        bounds = str(part).strip().split("-")
        numbers = not isinstance(part, bool) and all(re.fullmatch(r"[0-9]{1,6}", each) for each in bounds)
        if not numbers or len(bounds) > 2 or int(bounds[0]) > int(bounds[-1]):
            raise ValueError(f'"{_shown(value)}": not indices of layers, as "0-3,7"')
        found.update(range(int(bounds[0]), int(bounds[-1]) + 1))
    return frozenset(found)


def check_options(options: Mapping[str, Value]) -> None:
    """Raises TypeError or ValueError if these, with or without "method", are no options that any layer could have."""
    for name, value in options.items():
        if name in MODELS_OWN:
            raise ValueError(f"{name}: a layer of the model brings its own; take it out")
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{name} {_shown(value)}: neither a number nor a name")
    given = {"method": "pbs", **options}
    for name in MODELS_OWN:
        if f":{name}=" in str(given["method"]):
            raise ValueError(f"{_shown(given['method'])}: a layer of the model brings its own {name}; take it out")
    permutation = pbsattn.options(**given)["permutation"]  # type: ignore[arg-type] # which checks names and types
    if permutation == "arrival":
        raise ValueError(
            "permutation arrival: its order comes with each call, and none is brought by a server; take another"
        )
    pbsattn.plan(q_heads=1, kv_heads=1, q_len=1, kv_len=1, head_dim=64, **given)  # type: ignore[arg-type]


def _index(text: str, what: str) -> int | None:
    if text != EVERY and not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError(f'{what} "{_shown(text)}": not a number from 0 up, nor "{EVERY}" for every one')
    return None if text == EVERY else int(text)


def _object(value: object, what: str) -> dict[str, typing.Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{_shown(value)}: not an object of {what}; write {{"{EVERY}": ...}} for every one')
    return {str(key): each for key, each in value.items()}


def changes_of(value: object) -> tuple[Change, ...]:
    """Options by layer and head, in the order in which they go over each other, from an object or a file's path."""
    if isinstance(value, str):
        return changes_of(_load(value))
    found: list[Change] = []
    for layer, heads in _object(value, "layers").items():
        layer_index = _index(layer, "layer")
        for head, options in _object(heads, f"heads, of layer {layer}").items():
            place = f"layer {layer}, head {head}"
            head_index = _index(head, f"layer {layer}, head")
            try:
                check_options(_object(options, "options"))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {error}") from None
            found.append((layer_index, head_index, options))
    return tuple(sorted(found, key=lambda change: [-1 if index is None else index for index in change[:2]]))


def _load(path: str) -> typing.Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None


# Where a name's value goes, and what reads it.
_FIELDS: dict[str, tuple[str, Callable[[typing.Any], typing.Any]]] = {
    "min_tokens": ("min_tokens", lambda value: _whole(value, 2)),
    "settings": ("changes", changes_of),
    "layers": ("layers", _layers),
    "learned": ("learned", lambda value: pbsattn.read_learned(str(value))),
    "workspace_cap_mib": ("memory", lambda value: _whole(value, 1) << 20),
    "unsupported": ("unsupported", _unsupported),
    "over_flash_attn": ("over_flash_attn", _flag),
    "stats": ("stats", _flag),
}


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that the variables PBSATTN_*, and the JSON file that PBSATTN_CONFIG names, make.

    The file has the variables' names in small letters without PBSATTN_; variables go over it. An option of a method is a
    name like the others, and goes over the method's text. Raises ValueError or OSError, which names what is wrong and where.
    """
    given: dict[str, tuple[str, typing.Any]] = {}  # name: (where it stands, value)
    options = pbsattn.options()
    if path := environ.get(f"{PREFIX}CONFIG"):
        file = _load(path)
        if not isinstance(file, dict):
            raise ValueError(f"{path}: {_shown(file)}: not an object of settings")
        for name, value in file.items():
            if name not in ("method", *_FIELDS, *options):
                raise ValueError(
                    f'{path}: "{_shown(name)}": no such setting; there are method, {", ".join(_FIELDS)}, and options'
                )
            given[name] = (f"{path}: {name}", value)
    for name in ("method", *_FIELDS, *options):
        variable = PREFIX + name.upper()
        if environ.get(variable):
            given[name] = (variable, environ[variable])
    fields: dict[str, typing.Any] = {}
    where, method = given.get("method", ("", Settings.method))
    for name, (place, value) in given.items():
        try:
            if name in _FIELDS:
                field, parse = _FIELDS[name]
                fields[field] = parse(value)
            elif name != "method":
                check_options({"method": f"pbs:{name}={value}"})
                method = f"{method}:{name}={value}"
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
    try:
        check_options({"method": method})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
    made = Settings(method=method, **fields)
    if made.learned is None:
        for place, options in [(where, {"method": method}), *(("settings", changes) for _, _, changes in made.changes)]:
            if pbsattn.options(**{"method": "pbs", **options})["permutation"] == "learned":  # type: ignore[arg-type]
                raise ValueError(
                    f"{place}: permutation learned: it goes by weights, which a file has; name it, PBSATTN_LEARNED=model.pbs"
                )
    return made
