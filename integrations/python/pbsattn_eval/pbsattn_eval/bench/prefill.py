"""Time to first token of one model under several attentions, and what each costs in fidelity and memory."""

import dataclasses
import statistics
import time

import torch
import torch.nn.functional as F

import pbsattn.transformers

from ..attentions import timed

_HEAD_ROWS = 2048  # positions that go through the output layer at a time


@dataclasses.dataclass
class Result:
    """One attention at one length. What can't be measured is None."""

    attention: str
    tokens: int
    seconds: list[float]  # time to first token, of each run
    attention_seconds: float  # inside attention, of one more run
    density: float | None
    peak_bytes: int | None  # of device memory
    perplexity: float | None  # of the text, None on random weights
    differing: float | None  # share of positions whose most likely token is not the first attention's
    layers: int = 0  # that pbsattn took
    chunk: int | None = None  # tokens that go through the model at a time; None: all
    whole: str | None = None  # the same attention over the whole prompt, where this is in chunks

    @property
    def ttft(self):
        return statistics.median(self.seconds)

    def speed_up(self, base):
        """How many times faster than another's: the median over runs that took turns, since a host's speed drifts."""
        return statistics.median(theirs / own for own, theirs in zip(self.seconds, base.seconds))


def _first_token(model, ids, attention):
    out = attention.run(model, ids, use_cache=True, logits_to_keep=1)[-1]
    return out.logits[0, -1].argmax()


def _fidelity(model, ids, attention, baseline):
    """Perplexity of a text and the most likely token at each position; how many differ from `baseline`."""
    # With a cache, as in the timed runs: keys and values then have the same strides, for which some backends prepare.
    outs = attention.run(model.model, ids, use_cache=True)
    hidden = torch.cat([out.last_hidden_state[0] for out in outs])
    del outs
    nll, best = 0.0, []
    for start in range(0, hidden.shape[0], _HEAD_ROWS):
        logits = model.lm_head(hidden[start : start + _HEAD_ROWS]).float()
        best.append(logits.argmax(-1))
        targets = ids[0, start + 1 : start + 1 + _HEAD_ROWS]
        nll += float(F.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
    best = torch.cat(best)
    differing = None if baseline is None else float((best != baseline).float().mean())
    return float(torch.tensor(nll / (ids.shape[1] - 1)).exp()), best, differing


def _run_once(model, ids, attention, device):
    """Seconds to the first token, and the peak of device memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    _first_token(model, ids, attention).item()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@torch.no_grad()
def measure(model, ids, attentions, runs, real_text, say):
    """Results of every attention on one text. Timed runs take turns; the first attention is the baseline."""
    device, count = ids.device, ids.shape[1]
    results, baseline = {}, None
    for attention in attentions:
        say(f"{count} tokens, {attention.name}: " + ("fidelity" if real_text else "warm-up"))
        perplexity = differing = None
        with attention.on(model, stats=True):
            if real_text:
                perplexity, best, differing = _fidelity(model, ids, attention, baseline)
                baseline = best if baseline is None else baseline
            else:
                _first_token(model, ids, attention)
            layers = pbsattn.transformers.stats(model) if attention.method is not None else []
        visited, causal = sum(s.visited_blocks for s in layers), sum(s.causal_blocks for s in layers)
        results[attention.name] = Result(
            attention.name,
            count,
            [],
            0.0,
            visited / causal if causal else None,
            None,
            perplexity,
            differing,
            sum(s.taken > 0 for s in layers),
            attention.chunk,
            attention.whole,
        )
    for attention in attentions:
        with attention.on(model), timed(attention, device) as seconds:
            _run_once(model, ids, attention, device)
        results[attention.name].attention_seconds = seconds()
    for run in range(runs):
        for attention in attentions:
            with attention.on(model):
                seconds, peak = _run_once(model, ids, attention, device)
            say(f"{count} tokens, {attention.name}: run {run + 1} of {runs}, {seconds:.3f} s to the first token")
            results[attention.name].seconds.append(seconds)
            results[attention.name].peak_bytes = peak
    return list(results.values())
