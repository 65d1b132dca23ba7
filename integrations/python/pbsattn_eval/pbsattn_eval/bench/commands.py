"""Measurements: a model's prefill under several attentions (prefill, plot), the op by itself (op, overhead), and what
methods keep against what their public code keeps (lists)."""

import argparse
import json
import pathlib
import platform
import sys

import torch

from .. import models
from ..attentions import Attention
from . import lists, op, prefill, records
from .public_code import CODES


def _say(message):
    print(message, file=sys.stderr, flush=True)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m pbsattn_eval bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--json", help="write the measurements to this file")
    written.add_argument("--commit", help="what to write there as the commit (default: that of the source tree)")
    shared = argparse.ArgumentParser(add_help=False, parents=[written])
    shared.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kinds = "sdpa, flash, cudnn, efficient, math, fa3 (pip install fa3-fwd), or a method with settings, as pbs:top_p=0.8"
    heads = argparse.ArgumentParser(add_help=False)
    heads.add_argument("--heads", type=int, default=12, help="query heads (default 12)")
    heads.add_argument("--kv-heads", type=int, default=2, help="key heads (default 2)")
    heads.add_argument("--runs", type=int, default=5, help="timed runs of each (default 5; the median counts)")

    draw = commands.add_parser("plot", help="draw BASE.png and BASE.svg from what prefill --json wrote")
    draw.add_argument("json", nargs="+")
    draw.add_argument("--to", required=True, metavar="BASE")
    draw.add_argument("--attn", help="only these attentions")
    draw.add_argument("--lengths", help="only these lengths")

    command = commands.add_parser(
        "prefill",
        parents=[shared],
        help="time to first token, attention's share, density, peak memory, perplexity, tokens that differ",
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a GGUF file (dequantised), or a folder that save_pretrained wrote")
    what.add_argument(
        "--shape", help="random weights in the shape of " + ", ".join(models.SHAPES) + ": time and memory only"
    )
    command.add_argument("--lengths", default="8192", help="tokens of the prompts (default 8192)")
    command.add_argument(
        "--attn", default="sdpa,pbs", help=f"compared in turn, the first is the baseline: {kinds} (default sdpa,pbs)"
    )
    command.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="measure each method in chunks of so many tokens, too, beside the whole prompt",
    )
    command.add_argument("--text", help="a text file (default: the source of Python's standard library)")
    command.add_argument("--runs", type=int, default=3, help="timed runs of each (default 3; the median counts)")
    command.add_argument(
        "--yarn", type=float, default=4.0, help="factor of YaRN for prompts beyond the model's own length (default 4)"
    )
    command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    command.add_argument("--plot", help="write BASE.png and BASE.svg", metavar="BASE")

    command = commands.add_parser(
        "op", parents=[shared, heads], help="the time of one attention call on random tensors, its result checked first"
    )
    command.add_argument("--lengths", default="4096,8192", help="tokens (default 4096,8192)")
    command.add_argument("--head-dims", default="128", help="head_dim (default 128)")
    command.add_argument(
        "--attn",
        default="sdpa,full,pbs:keep=density:density=0.2",
        help=f"compared in turn, the first is the baseline: {kinds} (default sdpa, full and pbs at density 0.2)",
    )
    command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])

    command = commands.add_parser(
        "overhead",
        parents=[shared, heads],
        help="host time of a call beyond the library's launches, of a new plan, and the time of first calls",
    )
    command.add_argument(
        "--tokens", type=int, default=512, help="of the calls: few, so that a GPU never falls behind (default 512)"
    )
    command.add_argument("--head-dim", type=int, default=128)
    command.add_argument("--attn", default="sdpa,full,pbs,two-step", help=f"{kinds} (default sdpa,full,pbs,two-step)")

    command = commands.add_parser(
        "lists",
        parents=[written],
        help="blocks that methods keep, against their public code's; fails where fewer than "
        f"{lists.BAR:.1%}% of decisions agree in float32",
    )
    command.add_argument(
        "--public",
        required=True,
        metavar="FOLDER",
        help="of checkouts named OWNER+NAME: " + ", ".join(dict.fromkeys(code.repository for code in CODES.values())),
    )
    command.add_argument("--method", default=",".join(CODES), help="only these (default " + ",".join(CODES) + ")")
    command.add_argument("--tokens", default="2000,8100", help="lengths of random input (default 2000,8100)")
    command.add_argument("--heads", type=int, default=4, help="of random input (default 4)")
    command.add_argument("--seeds", type=int, default=3, help="random inputs of each length (default 3)")
    command.add_argument(
        "--model", help="also on queries and keys of this model: a GGUF file or a folder that save_pretrained wrote"
    )
    command.add_argument("--text", help="a text for it (default: the source of Python's standard library)")
    command.add_argument("--layers", type=int, default=3, help="of the model, evenly spaced (default 3)")
    return parser


def main(arguments=None):
    given = _parser().parse_args(arguments)
    if given.command == "plot":
        return _plot(given)
    if given.command == "lists":
        return _lists(given)
    given.device = torch.device(given.device)
    if given.device.type == "cuda" and given.device.index is None:
        given.device = torch.device("cuda", torch.cuda.current_device())
    given.attn = _attentions(given.attn, getattr(given, "chunk", None))
    if given.runs < 1:
        raise ValueError(f"--runs {given.runs}: need at least 1")
    if given.command == "prefill":
        return _prefill(given)
    if given.command == "op":
        made, table = op.rates(
            given.attn,
            given.device,
            getattr(torch, given.dtype),
            given.heads,
            given.kv_heads,
            _numbers("--lengths", given.lengths),
            _numbers("--head-dims", given.head_dims),
            given.runs,
            _say,
        )
    else:
        made, table = op.overhead(
            given.attn, given.device, given.heads, given.kv_heads, given.tokens, given.head_dim, given.runs
        )
    _write(given, made)
    print(f"{records.device_name(given.device)}; median of {given.runs} run(s)\n\n{table}")
    return made


def _attentions(text, chunk=None):
    """The attentions named; with `chunk` each method is followed by itself in chunks."""
    attentions = []
    for each in text.split(","):
        attentions.append(Attention.parse(each))
        if chunk is not None and attentions[-1].method is not None and attentions[-1].chunk is None:
            attentions.append(Attention.parse(f"{each}:chunk={chunk}"))
    if chunk is not None and all(each.chunk is None for each in attentions):
        raise ValueError(f"--chunk {chunk}: --attn {text} names no method, of which chunks are measured; add one, as auto")
    if len({each.name for each in attentions}) != len(attentions):
        raise ValueError(f"--attn {text}: names one twice")
    return attentions


def _numbers(option, text):
    numbers = [int(each) for each in text.split(",") if each.strip().isdigit()]
    if len(numbers) != len(text.split(",")) or min(numbers) < 1:
        raise ValueError(f"{option} {text}: write whole numbers above 0 with commas between, as 8192,32768")
    return numbers


def _write(given, made):
    for each in made:
        each.update(records.origin(given.device, given.commit))
    if given.json:
        records.write_json(given.json, made)


def _prompt(model, tokenizer, text, length, device):
    if tokenizer is None:
        return torch.randint(0, model.config.vocab_size, (1, length), device=device)
    return models.tokens(tokenizer, text, length, device)


def _plot(given):
    made = [each for path in given.json for each in json.loads(pathlib.Path(path).read_text(encoding="utf-8"))]
    if given.attn:
        made = [each for each in made if each["case"] in given.attn.split(",")]
    if given.lengths:
        made = [each for each in made if str(each["params"]["n"]) in given.lengths.split(",")]
    if not made:
        raise ValueError(
            f"{', '.join(given.json)}: no measurements of {given.attn or 'any attention'} at {given.lengths or 'any length'}"
        )
    titles = dict.fromkeys(f"{each['params']['model']}\n{each['device']}" for each in made)
    records.plot(made, given.to, "\n".join(titles))


def _lists(given):
    given.device = torch.device("cpu")
    lengths = _numbers("--tokens", given.tokens)
    if min(given.heads, given.seeds, given.layers) < 1:
        raise ValueError("--heads, --seeds and --layers: at least 1 each")
    inputs = {
        "random": [lists.random_input(length, given.heads, 128, seed) for length in lengths for seed in range(given.seeds)]
    }
    if given.model:
        name = pathlib.Path(given.model).name
        inputs[name] = list(_of_model(given, name, max(lengths)))
    made, table, wrong = lists.run(given.public, given.method.split(","), inputs, _say)
    _write(given, made)
    print(table)
    if wrong:
        raise RuntimeError(f"fewer than {lists.BAR:.1%} of decisions agree: " + "; ".join(wrong))
    return made


def _of_model(given, name, length):
    """Queries and keys of some layers on a text."""
    _say(f"loading {given.model}")
    model, tokenizer = models.load(given.model, given.device, torch.float32)
    text = pathlib.Path(given.text).read_text(encoding="utf-8") if given.text else models.python_source()
    count = model.config.num_hidden_layers
    wanted = {round(i * (count - 1) / max(given.layers - 1, 1)) for i in range(min(given.layers, count))}
    captured = models.capture(model, models.tokens(tokenizer, text, length, given.device), wanted)
    for _, (q, k, _, scale) in sorted(captured.items()):
        yield lists.Input(
            name, q * (scale * q.shape[-1] ** 0.5), k
        )  # public codes know no other scale than 1 / sqrt(head_dim)


def _prefill(given):
    lengths, device, dtype = _numbers("--lengths", given.lengths), given.device, getattr(torch, given.dtype)
    if min(lengths) < 2:
        raise ValueError(f"--lengths {given.lengths}: need at least 2 tokens")
    if given.chunk is not None and given.chunk >= max(lengths):
        raise ValueError(f"--chunk {given.chunk}: no prompt of --lengths {given.lengths} has more tokens; name fewer")
    tokenizer, text = None, None
    if given.shape:
        model, name, source = models.make(given.shape, device, dtype), f"{given.shape}, random weights", "random tokens"
    else:
        _say(f"loading {given.model}")
        model, tokenizer = models.load(given.model, device, dtype)
        name = pathlib.Path(given.model).name
        text = pathlib.Path(given.text).read_text(encoding="utf-8") if given.text else models.python_source()
        source = pathlib.Path(given.text).name if given.text else f"source of Python {platform.python_version()}"
    results = []
    for length in lengths:
        if tokenizer is not None:
            models.set_yarn(model, given.yarn if length > models.native_length(model) else 1)
        ids = _prompt(model, tokenizer, text, length, device)
        names = {each.name for each in given.attn}
        # What is no more than a chunk is the whole prompt.
        attentions = [each for each in given.attn if each.whole not in names or each.chunk < length]
        results += prefill.measure(model, ids, attentions, given.runs, tokenizer is not None, _say)
    made = records.records(results, name, source)
    _write(given, made)
    if given.plot:
        records.plot(made, given.plot, f"{name}\n{records.device_name(device)}")
    print(
        f"{name}; {source}; {records.device_name(device)}; median of {given.runs} run(s), "
        f"largest spread {records.spread_of(results):.0%}\n"
    )
    print(records.table(results))
    return results
