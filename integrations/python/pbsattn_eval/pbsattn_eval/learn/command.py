"""The command learn: fits an order of keys, finds the heads that it pays for, judges it by likelihood, and writes the file.

Each text is cut into three parts of --tokens. Each step's results of each text are a file in the run's folder, so that a run
that was stopped goes on with what is missing.
"""

import hashlib
import itertools
import json
import pathlib

import torch

import pbsattn
from pbsattn import program

from .. import folder, runs
from ..kinds import ppl
from . import file, judge, keep, order, steps


def run(given, argv, say):
    """Runs the command: returns its exit status; raises ValueError for what makes no sense, before a model is loaded."""
    from .. import engines

    thresholds = _thresholds(given)
    _check_paths(given)
    the_kind = judge.Judged()
    given.kind = "ppl"  # what the folder's records are of: `table` and `report` read them
    given.engine, given.judge, given.lengths = engines.Engine.name, "half", str(given.tokens)
    engines.fill_in(given)
    _check_device(given)
    the_kind.check(given)
    out = pathlib.Path(given.out or pathlib.Path("eval-runs", f"learn-{pathlib.Path(given.model).stem}"))
    orders = {name: [judge.attention(name, threshold) for threshold in thresholds] for name in judge.ORDERS}
    parts = {name: [keep.attention(name, part, given.tokens) for part in keep.PARTS] for name in judge.ORDERS}
    every = [judge.FULL, *itertools.chain(*orders.values(), *parts.values())]
    header = runs.header(given, the_kind, every, argv) | {"fit": order.VERSION}
    with folder.RunFolder(out, header) as records:
        try:
            engine = engines.make(given, say)
            items = the_kind.items(given, engine)
            fitted = steps.Fitted(engine, the_kind.parts, out, thresholds)
            moved = _moved(fitted)
            if moved[judge.PAYING] in (0, moved[judge.LEARNED]):  # it is one of the others
                del orders[judge.PAYING]
            for name, weights in ((judge.LEARNED, fitted.weights), (judge.PAYING, fitted.paying)):
                for each in (*orders[name], *parts[name]) if name in orders else ():
                    each.settings["learned"] = str(_write(out / f"{name.replace(' ', '-')}.pbs", given, fitted, weights, {}))
                    the_kind.weights[each.name] = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
            records.drop(the_kind.outdated)

            def measure(attentions):
                runs.measure(records, given.kind, the_kind, engine, items, attentions)
                return [records.done[item.id, each.name] for item in items for each in attentions]

            measured = measure([judge.FULL, *itertools.chain(*orders.values())])
            known = {name: [each.name for each in of_order] for name, of_order in orders.items()}
            names, told = judge.measured(measured, known)
            judgements = judge.compare(measured, names)
            taken = judge.choose(judgements)
            for part, attention in zip(keep.PARTS, parts[taken]):
                losses = keep.changes(measure([judge.FULL, attention]), attention.name)
                told.append(keep.line(part, losses))
                if keep.low_enough(losses):
                    break
        except KeyboardInterrupt as interrupt:
            say(f"\npbsattn_eval: interrupted; what is finished is kept in {out}: run the same command to go on")
            return program.status_of(interrupt)
    return _finish(given, say, header, out, fitted, moved, judgements, taken, part, told)


def _thresholds(given):
    """Shares of a row's attention, ascending."""
    if given.tokens < 8 * order.SEGMENT:
        raise ValueError(f"--tokens {given.tokens}: too few to fit on; {8 * order.SEGMENT} is the least")
    if given.thresholds is None:
        options = pbsattn.options(judge.METHOD)
        own = min(options["threshold"], options["threshold_tokens"] / given.tokens)
        return [own, 2 * own]
    try:
        shares = sorted(float(each) for each in given.thresholds.split(","))
    except ValueError:
        raise ValueError(f"--thresholds {given.thresholds}: not numbers with commas between") from None
    if len(shares) < 2 or not all(0 < each <= 1 for each in shares):
        raise ValueError(f"--thresholds {given.thresholds}: pass two shares or more, above 0 and up to 1")
    if len({judge.share(each) for each in shares}) < len(shares):
        raise ValueError(f"--thresholds {given.thresholds}: two are the same in six digits; pass others")
    return shares


def _check_paths(given):
    """Refuses files to write whose folder isn't there, before hours are spent."""
    for option, path in (("--to", given.to), ("--json", given.json)):
        if path and path != "-" and not pathlib.Path(path).parent.is_dir():
            raise ValueError(f"{option} {path}: its folder isn't there; make it, or name a file elsewhere")


def _check_device(given):
    """Refuses a device by which no order could be judged, before hours are spent on the fit."""
    if torch.device(given.device).type != "cpu" and given.dtype == "float32":
        raise ValueError(f"--dtype float32: --device {given.device} has products of 16 bits alone; pass bfloat16 or float16")
    sizes = dict(q_heads=1, kv_heads=1, q_len=given.tokens, kv_len=given.tokens, head_dim=64)
    pbsattn.plan(device=given.device, method=judge.METHOD, **sizes)


def _moved(fitted):
    """KV heads whose keys each order moves."""
    every = fitted.weights.shape[0] * fitted.weights.shape[1]
    paying = int(fitted.paying.any(-1).sum())
    return {name: {judge.NONE: 0, judge.PAYING: paying}.get(name, every) for name in judge.ORDERS}


def settings_of(taken, weights, part=1):
    """A file's settings for the order taken and a part of the thresholds, by layer: what differs from two-step scores of the
    learned order at their own."""
    learned = taken in (judge.LEARNED, judge.PAYING)
    still = [str(layer) for layer, of_heads in enumerate(weights) if not of_heads.any()] if learned else []
    every = ({} if learned else judge.ORDERS[taken]) | ({} if part == 1 else keep.options(part))
    settings = {"*": {"*": every}} if every else {}
    return settings | {layer: {"*": judge.ORDERS[judge.NONE]} for layer in still}


def _write(path, given, fitted, weights, settings):
    texts = [ppl.text_identity(text) for text in given.text]
    fitted_on = ", ".join(f"{given.tokens} tokens of {each['name']} (sha256 {each['sha256']})" for each in texts)
    file.write(path, fitted.sizes, fitted.pairs, weights, settings, pathlib.Path(given.model).name, fitted_on)
    return path


def _finish(given, say, header, out, fitted, moved, judgements, taken, part, told):
    """Writes the file and the rows, and prints the table."""
    weights = {judge.LEARNED: fitted.weights, judge.PAYING: fitted.paying}.get(taken, torch.zeros_like(fitted.weights))
    _write(given.to, given, fitted, weights, settings_of(taken, weights, part))
    rows = json.dumps(judge.rows(judgements, header), indent=1) + "\n"
    program.write_whole(out / "orders.json", rows)
    if given.json and given.json != "-":
        program.write_whole(given.json, rows)
    told.append(f"{given.to}: {taken}" + ("" if part == 1 else f", at {part:g} of two-step's threshold"))
    if given.json == "-":
        print(rows.rstrip())
        say("\n".join(told))
    else:
        print("\n".join([judge.table(judgements, moved, taken), *told[:-1], "", told[-1]]))
    return 0
