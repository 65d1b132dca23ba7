"""How calls are timed, and the form in which measurements are printed and written."""

import datetime
import json
import statistics

import torch

from common import write_whole


def spread(times):
    return (max(times) - min(times)) / statistics.median(times)


def keep_busy():
    """Occupies the GPU for a millisecond or so, in which the host gets ahead: its own time then doesn't count."""
    torch.cuda._sleep(2_000_000)


def milliseconds(calls, runs, warmup=1):
    """Times of each call, taken in turns so that drift meets all alike. A call gets the run's number, to rotate buffers."""
    times = {name: [] for name in calls}
    for i in range(warmup + runs):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            keep_busy()
            start.record()
            call(i)
            stop.record()
            stop.synchronize()
            if i >= warmup:
                times[name].append(start.elapsed_time(stop))
    return times


def in_graph(name, call, repeats):
    """A CUDA graph of several calls, so that launching from Python doesn't count; the calls themselves, after a word, where
    they can't be captured."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(repeats):
                call(i)
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"{name}: launched call by call, since CUDA graphs don't take it: {str(error).partition(chr(10))[0]}")
        return lambda i: [call(j) for j in range(repeats)]
    return lambda i: graph.replay()


def milliseconds_in_graphs(calls, runs, repeats=8):
    times = milliseconds({name: in_graph(name, call, repeats) for name, call in calls.items()}, runs)
    return {name: [t / repeats for t in values] for name, values in times.items()}


def words(params):
    return " ".join(f"{key}={item:.4g}" if isinstance(item, float) else f"{key}={item}" for key, item in params.items())


def params_of(n, widths, **more):
    head_dim, head_dim_v = widths
    return {"n": n, "head_dim": head_dim, **({} if head_dim_v == head_dim else {"head_dim_v": head_dim_v}), **more}


def pairs_of(rotations, ours, values_of=lambda name, times: times):
    """Returns {peer: (our values, its values)}, each from the turns that both took, of the peers in rotations."""
    return {
        peer: (values_of(ours, times[ours]), values_of(peer, times[peer]))
        for times in rotations
        for peer in times
        if not peer.startswith("ours")
    }


class Report:
    def __init__(self, commit):
        self.common = {"device": torch.cuda.get_device_name(), "commit": commit, "date": datetime.date.today().isoformat()}
        self.records = []

    def add(self, case, params, metric, values, unit, peer=None, peer_values=None, ratio=None, best=None):
        """`values` are those of each run; `ratio` is ours against the peer's, above 1 better for us; `best` names the
        strongest of the peers that were measured together."""
        value = statistics.median(values)
        peer_value = None if peer_values is None else statistics.median(peer_values)
        self.records.append(
            {
                "suite": "gpu",
                "case": case,
                "params": params,
                "metric": metric,
                "value": value,
                "unit": unit,
                "peer": peer,
                "peer_value": peer_value,
                "ratio": ratio,
                **({"best": best} if best else {}),
                "runs": len(values),
                "spread": round(spread(values), 4),
                **self.common,
            }
        )
        line = f"{case:<16} {words(params):<34} {metric:<17} {value:10.4g} {unit:<8}"
        if peer:
            line += f" {peer_value:10.4g} {peer:<24}" + (f" {ratio:6.2f}x" if ratio else "")
        print(line + f"  (spread {self.records[-1]['spread']:.1%})", flush=True)

    def add_peers(self, case, params, metric, unit, pairs):
        """Adds a record for each {peer: (our values, its values)}, and a line on the strongest. Of rates more is better, of
        times less; larger ratios are better for us."""
        medians = {peer: [statistics.median(values) for values in pair] for peer, pair in pairs.items()}
        ratios = {peer: ours / its if unit.endswith("/s") else its / ours for peer, (ours, its) in medians.items()}
        best = min(ratios, key=ratios.__getitem__, default=None)
        for peer, (ours, its) in pairs.items():
            self.add(case, params, metric, ours, unit, peer, its, ratios[peer], best)
        if best:
            print(f"{case:<16} {words(params):<34} best of peers {best} {ratios[best]:.2f}x", flush=True)

    def write(self, path):
        write_whole(path, json.dumps(self.records, indent=1) + "\n")
