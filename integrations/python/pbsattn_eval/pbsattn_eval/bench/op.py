"""The op by itself: its time against PyTorch's SDPA, and what the Python path of a call costs the host."""

import functools
import statistics
import time

import torch

import pbsattn

from ..attentions import Attention
from ..tables import aligned, show
from . import records

_CHECKED_ROWS = 256
_CALLS = 50  # between two waits for a GPU: few enough that its queue of launches never fills


def _inputs(device, dtype, heads, kv_heads, tokens, head_dim):
    generator = torch.Generator(device).manual_seed(tokens + head_dim)

    def make(count):
        return torch.randn(1, count, tokens, head_dim, generator=generator, device=device).to(dtype)

    return make(heads), make(kv_heads), make(kv_heads)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call, device, times=1, wait=True):
    """Of one call: with `wait` until its work is done, else until it returns."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    if wait:
        _wait(device)
    return (time.perf_counter() - start) / times


def _spread(seconds):
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _rows_error(out, q, k, v, rows):
    """Relative error of some queries' outputs against float64."""
    group = q.shape[1] // k.shape[1]
    wrong = whole = 0.0
    for head in range(q.shape[1]):  # one at a time, for memory
        keys, values = (t[0, head // group, : rows.stop].double() for t in (k, v))
        scores = q[0, head, rows].double() @ keys.T * q.shape[-1] ** -0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(rows.start + 1)
        truth = torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ values
        wrong += float((out[0, head, rows].double() - truth).square().sum())
        whole += float(truth.square().sum())
    return (wrong / whole) ** 0.5


def _check(attention, q, k, v, allowed):
    """Density and error of the last rows, None where they are sparse. RuntimeError if the result is wrong.

    The first rows are exact under every method, as their keys are always kept; the last ones are if all blocks are.
    """
    tokens = q.shape[2]
    if attention.method is None:
        out, density = attention.compute(q, k, v), None
    else:
        out, stats = attention.compute(q, k, v, return_stats=True)
        density = stats.density
    errors = {"first": _rows_error(out, q, k, v, slice(0, min(128, tokens)))}
    if density in (None, 1.0):
        errors["last"] = _rows_error(out, q, k, v, slice(max(0, tokens - _CHECKED_ROWS), tokens))
    for rows, error in errors.items():
        limit = 2 * allowed.setdefault(rows, error) + 1e-6
        if not error <= limit:
            raise RuntimeError(
                f"{attention.name}, {tokens} tokens: its {rows} rows are off by {error:.2g}, and {limit:.2g}, "
                "twice SDPA's error, is allowed; its time would mean nothing"
            )
    return density, errors.get("last")


@torch.no_grad()
def rates(attentions, device, dtype, heads, kv_heads, lengths, head_dims, runs, say):
    """Records of the time of every attention, each checked first. Runs take turns; the first attention is the baseline."""
    made, rows = [], [("tokens", "head_dim", "attention", "time", "GFLOP/s", "speed-up", "density", "error")]
    for tokens, head_dim in [(n, d) for d in head_dims for n in lengths]:
        q, k, v = _inputs(device, dtype, heads, kv_heads, tokens, head_dim)
        allowed, found = {}, {}
        _check(Attention("sdpa"), q, k, v, allowed)
        for each in attentions:
            say(f"{tokens} tokens, head_dim {head_dim}: checking {each.name}")
            found[each.name] = _check(each, q, k, v, allowed)
        seconds = {each.name: [] for each in attentions}
        for _ in range(runs):
            for each in attentions:
                seconds[each.name].append(_seconds(functools.partial(each.compute, q, k, v), device))
        base = statistics.median(seconds[attentions[0].name])
        for each in attentions:
            median, (density, error) = statistics.median(seconds[each.name]), found[each.name]
            speed_up = statistics.median(
                a / b for a, b in zip(seconds[attentions[0].name], seconds[each.name])
            )  # of each turn
            rate = 2e-9 * heads * head_dim * tokens * (tokens + 1) * (density or 1.0) / median
            against = None if each is attentions[0] else attentions[0].name
            params = dict(
                n=tokens,
                head_dim=head_dim,
                heads=heads,
                kv_heads=kv_heads,
                dtype=records.dtype_name(dtype),
                threads=torch.get_num_threads() if device.type == "cpu" else None,
                density=density,
                error=error,
            )
            made.append(
                records.record(
                    "op", each.name, params, "time", median, "s", against, base, speed_up, runs, _spread(seconds[each.name])
                )
            )
            rows.append(
                (
                    str(tokens),
                    str(head_dim),
                    each.name,
                    f"{median * 1e3:.2f} ms",
                    f"{rate:.0f}",
                    f"{speed_up:.2f}x",
                    show(density, "{:.3f}"),
                    show(error, "{:.2e}"),
                )
            )
    return made, aligned(rows, left=("attention",))


@torch.no_grad()
def overhead(attentions, device, heads, kv_heads, tokens, head_dim, runs):
    """Records of what a call and a new plan cost the host, and of how long first calls take."""
    q, k, v = _inputs(device, torch.bfloat16, heads, kv_heads, tokens, head_dim)
    _wait(device)
    first = {each.name: _seconds(functools.partial(each.compute, q, k, v), device) for each in attentions}
    ways = {}
    for each in attentions:
        ways[each.name, "call"] = functools.partial(each.compute, q, k, v)
        if each.method is not None:
            make = functools.partial(_plan, each, q, k)
            ways[each.name, "plan"] = make
            plan = make()
            workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=device)
            ways[each.name, "library"] = plan.bind(q, k, v, torch.empty_like(q), workspace)
    seconds = {way: [] for way in ways}
    for run in range(runs + 1):  # the first warms up
        for way, call in ways.items():
            taken = _seconds(call, device, _CALLS, wait=False)
            if run > 0:
                seconds[way].append(taken)
    made, rows = [], [("attention", "first call", "a call on the host", "of it the library", "Python path", "a new plan")]
    for each in attentions:
        times = {part: seconds[name, part] for name, part in ways if name == each.name}
        middle = {part: statistics.median(taken) for part, taken in times.items()}
        measured = [("first call", first[each.name], 0.0), ("host time of a call", middle["call"], _spread(times["call"]))]
        if "library" in middle:
            measured += [
                ("host time in the library", middle["library"], _spread(times["library"])),
                ("host time of the Python path", middle["call"] - middle["library"], 0.0),
                ("host time of a new plan", middle["plan"], _spread(times["plan"])),
            ]
        for metric, value, spread in measured:
            made.append(
                records.record(
                    "overhead",
                    each.name,
                    dict(n=tokens, head_dim=head_dim, heads=heads, kv_heads=kv_heads),
                    metric,
                    value,
                    "s",
                    runs=1 if metric == "first call" else runs,
                    spread=spread,
                )
            )
        own = middle["call"] - middle["library"] if "library" in middle else None
        rows.append(
            (
                each.name,
                f"{first[each.name] * 1e3:.1f} ms",
                *(
                    show(seconds and seconds * 1e6, "{:.1f} us")
                    for seconds in (middle["call"], middle.get("library"), own, middle.get("plan"))
                ),
            )
        )
    return made, aligned(rows, left=("attention",))


def _plan(attention, q, k):
    """A plan of a call, made anew: what a call of a shape that wasn't there before costs more."""
    return pbsattn.plan(
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        head_dim=q.shape[3],
        device=q.device,
        method=attention.method,
        threads=torch.get_num_threads(),
    )
