"""What plug-ins of servers say in the log."""

import logging
from collections.abc import Mapping, Sequence

from .layers import Layer, leaves_all
from .settings import Settings


class Teller:
    """Says things in a plug-in's log."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.warned: set[str] = set()

    def warn_once(self, kind: str, told: str) -> None:
        """Logs a warning, the first of its kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            self.log.warning("pbsattn: %s", told)

    def layers(
        self,
        layers: Mapping[str, Layer | str],
        server: str,
        settings: Settings,
        least: int,
        most: tuple[int, int],
        bounds: str,
        reserved: int,
        others: Sequence[Layer] = (),
    ) -> None:
        """Logs which layers are taken and how, which are left and why, and once if nothing can be taken.

        server: its name and version. least: tokens that a row needs. most: those that the server's scheduler lets it have,
        by what bounds names, and those of its sequence. reserved: bytes. others: the engine's other layers that are taken.
        """
        import pbsattn

        taken = [layer for layer in layers.values() if isinstance(layer, Layer)]
        left: dict[str, list[str]] = {}
        for name, reason in layers.items():
            if isinstance(reason, str):
                left.setdefault(reason, []).append(name)
        if taken:
            direct = sum(layer.in_place for layer in taken)
            mixed = f"in place by {direct}, else gathered"
            how = {0: "gathered", len(taken): "in place"}.get(direct, mixed)
            self.log.info(
                "pbsattn %s, %s: takes %d of %d layers (%d .. %d) by %s, in prefills of %d tokens or more, "
                "their pages %s (%s tokens); %d MiB reserved",
                pbsattn.__version__,
                server,
                len(taken),
                len(layers),
                taken[0].index,
                taken[-1].index,
                told_method(settings),
                least,
                how,
                ", ".join(map(str, sorted({layer.facts.page_size for layer in taken}))),
                reserved >> 20,
            )
            self._nothing([*taken, *others], settings, least, most, bounds)
        for reason, names in left.items():
            self.log.warning("pbsattn: leaves %d layers to FlashAttention (%s ...): %s", len(names), names[0], reason)

    def _nothing(self, taken: Sequence[Layer], settings: Settings, least: int, most: tuple[int, int], bounds: str) -> None:
        told = None
        if most[0] < least:
            told = (
                f"the scheduler lets a chunk have {most[0]} tokens ({bounds}), and a row needs {least} (PBSATTN_MIN_TOKENS)"
            )
        elif all(layer.facts.window is not None and layer.facts.window < least for layer in taken):
            told = f"no layer's window has the {least} tokens that a row needs; lower PBSATTN_MIN_TOKENS"
        elif all(leaves_all(layer, least, *most) for layer in taken):
            told = (
                f"by {told_method(settings)} every chunk there can be, of at most {most[0]} tokens ({bounds}) over at most "
                f"{most[1]}, is full attention or longer than a window; allow longer chunks, or take another method, as "
                "two-step"
            )
        if told is not None:
            self.warn_once(told, f"takes nothing: {told}")


def told_method(given: Settings) -> str:
    """The method, for people, and what goes with it."""
    learned = f" with the learned order {given.learned.name}" if given.learned is not None else ""
    return given.method + learned + (" and settings by layer" if given.changes else "")
