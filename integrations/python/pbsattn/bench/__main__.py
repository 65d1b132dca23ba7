"""python -m pbsattn.bench prefill --model PATH_OR_GGUF: a model's prefill under several attentions."""

import argparse
import json
import pathlib
import platform
import sys

import torch

import pbsattn

from . import models, prefill, report
from .attentions import Attention


def _say(message):
    print(message, file=sys.stderr, flush=True)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m pbsattn.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("plot", help="draw BASE.png and BASE.svg from what prefill --json wrote")
    draw.add_argument("json", nargs="+")
    draw.add_argument("--to", required=True, metavar="BASE")
    draw.add_argument("--attn", help="only these attentions")
    draw.add_argument("--lengths", help="only these lengths")
    command = commands.add_parser(
        "prefill", help="time to first token, attention's share, density, peak memory, perplexity, tokens that differ")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a GGUF file (dequantised), or a folder that save_pretrained wrote")
    what.add_argument("--shape", help="random weights in the shape of " + ", ".join(models.SHAPES) + ": time and memory only")
    command.add_argument("--lengths", default="8192", help="tokens of the prompts (default 8192)")
    command.add_argument("--attn", default="sdpa,pbs",
                         help="compared in turn, the first is the baseline: sdpa, flash, cudnn, efficient, math, or a method "
                              "with settings, as pbs:top_p=0.8 (default sdpa,pbs)")
    command.add_argument("--text", help="a text file (default: the source of Python's standard library)")
    command.add_argument("--runs", type=int, default=3, help="timed runs of each (default 3; the median counts)")
    command.add_argument("--yarn", type=float, default=4.0,
                         help="factor of YaRN for prompts beyond the model's own length (default 4)")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    command.add_argument("--json", help="write the measurements to this file")
    command.add_argument("--plot", help="write BASE.png and BASE.svg", metavar="BASE")
    return parser


def _device_name(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{pbsattn._core.describe_cpu().processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def _prompt(model, tokenizer, text, length, device):
    if tokenizer is None:
        return torch.randint(0, model.config.vocab_size, (1, length), device=device)
    return models.tokens(tokenizer, text, length, device)


def main(arguments=None):
    given = _parser().parse_args(arguments)
    return _plot(given) if given.command == "plot" else _prefill(given)


def _plot(given):
    made = [each for path in given.json for each in json.loads(pathlib.Path(path).read_text(encoding="utf-8"))]
    if given.attn:
        made = [each for each in made if each["case"] in given.attn.split(",")]
    if given.lengths:
        made = [each for each in made if str(each["params"]["n"]) in given.lengths.split(",")]
    if not made:
        raise ValueError(f"{', '.join(given.json)}: no measurements of {given.attn or 'any attention'} at "
                         f"{given.lengths or 'any length'}")
    titles = dict.fromkeys(f"{each['params']['model']}\n{each['device']}" for each in made)
    report.plot(made, given.to, "\n".join(titles))


def _prefill(given):
    attentions = [Attention.parse(text) for text in given.attn.split(",")]
    lengths = [int(text) for text in given.lengths.split(",")]
    if len({each.name for each in attentions}) != len(attentions):
        raise ValueError(f"--attn {given.attn}: names one twice")
    if min(lengths) < 2 or given.runs < 1:
        raise ValueError(f"--lengths {given.lengths}, --runs {given.runs}: need at least 2 tokens and 1 run")
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
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
        results += prefill.measure(model, ids, attentions, given.runs, tokenizer is not None, _say)
    print(f"{name}; {source}; {_device_name(device)}; median of {given.runs} run(s), "
          f"largest spread {report.spread_of(results):.0%}\n")
    print(report.table(results))
    made = report.records(results, name, source, _device_name(device))
    if given.json:
        report.write_json(given.json, made)
    if given.plot:
        report.plot(made, given.plot, f"{name}\n{_device_name(device)}")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"pbsattn.bench: {error}")
