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


def in_graph(call, repeats):
    """A CUDA graph of several calls, so that launching from Python doesn't count."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            call(i)
    return lambda i: graph.replay()


def milliseconds_in_graphs(calls, runs, repeats=8):
    times = milliseconds({name: in_graph(call, repeats) for name, call in calls.items()}, runs)
    return {name: [t / repeats for t in values] for name, values in times.items()}


class Report:
    def __init__(self, commit):
        self.common = {"device": torch.cuda.get_device_name(), "commit": commit, "date": datetime.date.today().isoformat()}
        self.records = []

    def add(self, case, params, metric, values, unit, peer=None, peer_values=None, ratio=None):
        """`values` are those of each run; `ratio` is ours against the peer's, above 1 better for us."""
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
                "runs": len(values),
                "spread": round(spread(values), 4),
                **self.common,
            }
        )
        words = " ".join(f"{key}={item:.4g}" if isinstance(item, float) else f"{key}={item}" for key, item in params.items())
        line = f"{case:<16} {words:<34} {metric:<17} {value:10.4g} {unit:<8}"
        if peer:
            line += f" {peer_value:10.4g} {peer:<18}" + (f" {ratio:6.2f}x" if ratio else "")
        print(line + f"  (spread {self.records[-1]['spread']:.1%})", flush=True)

    def add_times(self, case, params, ours, peers):
        """Milliseconds of ours against each peer's; larger ratios are better for us."""
        for peer, times in peers.items():
            self.add(case, params, "time", ours, "ms", peer, times, statistics.median(times) / statistics.median(ours))

    def write(self, path):
        write_whole(path, json.dumps(self.records, indent=1) + "\n")
