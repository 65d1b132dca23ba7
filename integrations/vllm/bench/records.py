"""Measurements in a JSON file, in the form of every benchmark of this project, which a run that was stopped goes on with."""

import json
import pathlib
import statistics
import sys
import time

from pbsattn_eval.bench import records as shared

PEER = "FlashAttention in vLLM"


def say(text: str) -> None:
    print(f"{time.strftime('%T')} {text}", file=sys.stderr, flush=True)


class Records:
    """What was measured, by part and case; each new measurement is written at once."""

    def __init__(self, path: str, origin: dict, seconds: float) -> None:
        self.path, self.origin = pathlib.Path(path), origin
        self.made = json.loads(self.path.read_text()) if self.path.exists() else []
        self.end = time.monotonic() + seconds

    def left(self, part: str, **params: object) -> bool:
        """Whether a case is still to measure, and there is time to begin it."""
        wanted = {"part": part, **params}
        if any(wanted.items() <= each["params"].items() for each in self.made):
            return False
        if time.monotonic() > self.end:
            say(f"{wanted}: not begun, the time is over")
            return False
        return True

    def add(self, case: str, params: dict, metric: str, value: float, unit: str, **others: object) -> None:
        """A measurement; others: peer_value, ratio, runs, spread."""
        peer = PEER if "peer_value" in others else None
        self.made.append(shared.record("vllm", case, params, metric, value, unit, peer, **others) | self.origin)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.made, indent=1) + "\n")
        temporary.replace(self.path)
        ratio = f", {others['ratio']:.3f}x" if others.get("ratio") is not None else ""
        say(f"{params} {case}: {metric} {value:.5g} {unit}{ratio}")

    def in_turns(self, params: dict, metric: str, unit: str, times: dict[str, list[float]], flash: str) -> None:
        """Times of methods that took turns. A ratio is the median of the turns', above 1 where a method is faster."""
        for case, each in times.items():
            value = statistics.median(each)
            spread = (max(each) - min(each)) / value
            against = {}
            if case != flash:
                ratio = statistics.median(theirs / own for own, theirs in zip(each, times[flash]))
                against = {"peer_value": statistics.median(times[flash]), "ratio": ratio}
            self.add(case, params, metric, value, unit, runs=len(each), spread=spread, **against)
