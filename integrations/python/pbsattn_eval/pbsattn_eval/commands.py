"""The commands of python -m pbsattn_eval: methods on a model, item by item, a table of how they compare with full attention,
and pages of such tables."""

import argparse
import json
import pathlib
import sys

from pbsattn import program

from . import budgets, curves, folder, kind, page, runs, summary
from .learn import arguments as learn


def _say(message):
    print(message, file=sys.stderr, flush=True)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m pbsattn_eval",
        description=("Runs methods on a model, and says what they cost and gain against full attention."),
    )
    commands = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    for name, text in kind.KINDS.items():
        command = commands.add_parser(name, help=text, description=text)
        _add_shared(command)
        kind.load(name).add_arguments(command.add_argument_group("of " + name))
    search = commands.add_parser(
        "budgets",
        help="for each head of a model the columns and diagonals of MInference that fit it best, as a file of settings",
    )
    _add_model(search)
    budgets.add_arguments(search)
    order = commands.add_parser(
        "learn", help=learn.HELP, description=learn.DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_model(order)
    learn.add_arguments(order)
    again = commands.add_parser("table", help="print the table of a run's folder again")
    again.add_argument("folder")
    again.add_argument("--json", metavar="FILE", help="write the table's rows as JSON; - for the standard output")
    results = commands.add_parser("page", help="put the tables and plots of runs into a page of results")
    results.add_argument("folder", nargs="+", help="of a run, or NAME=FOLDER,FOLDER,...: parts of one run")
    results.add_argument("--to", required=True, metavar="BASE", help="writes BASE.md, BASE.json and BASE-RUN.svg")
    results.add_argument(
        "--against",
        default=[],
        nargs="+",
        metavar="METHOD",
        help="compare with these methods' settings too, at equal density",
    )
    results.add_argument(
        "--densities",
        type=_densities,
        default=curves.DENSITIES,
        metavar="D,D,...",
        help="at which methods are compared (default %(default)s)",
    )
    report = commands.add_parser("report", help="make one HTML page, with figures, of runs")
    report.add_argument("folder", nargs="+", help="of a run, which may still go on")
    report.add_argument("--to", metavar="FILE", help="the page (default FOLDER/report.html, of the first folder)")
    commands.add_parser(
        "bench", help="measure time: of a model's prefill, and of the op (bench --help lists the benchmarks)"
    )
    return parser


def _densities(text):
    return tuple(map(float, text.split(",")))


def _add_model(command):
    command.add_argument(
        "--model", required=True, help="a GGUF file (dequantised by transformers), or a folder that save_pretrained wrote"
    )
    command.add_argument("--device", help="cpu or cuda (default cuda where there is one)")
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the model (default bfloat16 on cuda, float32 on the CPU)",
    )
    command.add_argument(
        "--yarn", type=float, default=4.0, help="factor of YaRN for what is longer than the model's own length (default 4)"
    )


def _add_shared(command):
    _add_model(command)
    command.add_argument(
        "--methods",
        default="pbs",
        metavar="SPEC,SPEC,...",
        help="methods with settings, as pbs:top_p=0.8:dense_last_rows=1; NAME=A/B/C is one method for each "
        "number; every: a sweep of each method; full always runs and comes first (default pbs)",
    )
    command.add_argument(
        "--out",
        metavar="FOLDER",
        help="of the run (default eval-runs/KIND-MODEL); a run that was stopped goes on where it was",
    )
    command.add_argument("--engine", default="transformers", choices=["transformers", "llama"])
    command.add_argument("--program", default="pbsattn", help="of the engine llama (default pbsattn, on PATH)")
    command.add_argument("--json", metavar="FILE", help="write the table's rows as JSON; - for the standard output")
    command.add_argument("--page", metavar="BASE", help="put the run into a page of results, as `page --to BASE` does")
    command.add_argument("--commit", help="what to write as the commit (default: that of the source tree)")


# What `--methods every` stands for: every method, each at densities from about .07 to .4 at 32K tokens.
EVERY = (
    "pbs:top_p=0.45/0.6/0.75/0.9",
    "pbs:order_scope=kv_head:top_p=0.45/0.6/0.75/0.9",
    "pbs:segment=512:top_p=0.45/0.6/0.75/0.9",
    "pbs-unpermuted:top_p=0.35/0.55/0.75/0.9",
    "pbs+:top_p=0.45/0.6/0.75/0.9",
    "xattention:top_p=0.6/0.75/0.85/0.9",
    "mean-pool:top_p=0.6/0.75/0.85/0.9",
    "flashprefill:threshold=0.03/0.07/0.15/0.3",
    "flashprefill:correction=none:threshold=0.03/0.07/0.15/0.3",
    "prism:top_p=0.6/0.75/0.85/0.95",
    "flexprefill:top_p=0.7/0.8/0.9/0.95",
    "minference:vertical=100:slash=800/1600/3200/6400",
    "streaming:local_blocks=16/32/64/128",
    "pbs-threshold:threshold=0.0015/0.003/0.006/0.012",
    "pbs-threshold:permutation=none:threshold=0.0015/0.003/0.006/0.012",
    "pbs-sampled:threshold=0.0015/0.003/0.006/0.012",
    "pbs-sampled:permutation=none:threshold=0.0015/0.003/0.006/0.012",
    "pbs-two-step:threshold_tokens=64/96/128/192",
    "two-step:threshold_tokens=64/96/128/192",
    "oracle:top_p=0.7/0.8/0.9/0.95",
    "oracle:keep=threshold:threshold=0.0015/0.003/0.006/0.012",
)


def expand(text):
    """Method specs of a list, NAME=A/B/C taken apart; full first."""
    specs = []
    for spec in (one for each in text.split(",") for one in (EVERY if each.strip() == "every" else [each])):
        made = [""]
        for part in spec.strip().split(":"):
            name, equals, values = part.partition("=")
            several = values.split("/") if equals and all(map(_is_number, values.split("/"))) else [values]
            made = [f"{head}{':' if head else ''}{name}{equals}{value}" for head in made for value in several]
        specs += made
    if "" in specs:
        raise ValueError(f'--methods "{text}": names an empty method; write, say, pbs:top_p=0.8/0.9,pbs-threshold')
    return list(dict.fromkeys([summary.BASELINE, *specs]))


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _run(given, argv):
    from . import engines  # PyTorch comes in here

    the_kind = kind.load(given.kind)
    if given.engine not in the_kind.engines:
        raise ValueError(f"--engine {given.engine}: {given.kind} runs on {', '.join(the_kind.engines)} only")
    engines.fill_in(given)
    attentions = [engines.Attention.parse(spec) for spec in expand(given.methods)]
    the_kind.check(given)
    out = given.out or pathlib.Path("eval-runs", f"{given.kind}-{pathlib.Path(given.model).stem}")
    header = runs.header(given, the_kind, attentions, argv)
    with folder.RunFolder(out, header) as run:
        if run.done:
            _say(f"{out}: goes on; {len(run.done)} record(s) are there")
        try:
            engine = engines.make(given, _say)
            items = the_kind.items(given, engine)
            runs.measure(run, given.kind, the_kind, engine, items, attentions)
        except KeyboardInterrupt as interrupt:
            _say(f"\npbsattn_eval: interrupted; {len(run.done)} record(s) are kept in {out}: run the same command to go on")
            return program.status_of(interrupt)
        wanted = {(item.id, each.name) for item in items for each in attentions}
        records = [run.done[item.id, each.name] for item in items for each in attentions]
        if extra := set(run.done) - wanted:
            raise ValueError(f"{out}: holds {len(extra)} record(s) that this run has no items for; pass another --out")
    return _finish(pathlib.Path(out), folder.read_header(out), the_kind, records, given.json, given.page)


def _finish(out, header, the_kind, records, to_json, to_page=None):
    """Writes the files, then prints: who reads only a part of that loses nothing."""
    records = summary.over_whole_layers(records)
    rows = summary.rows(records, the_kind.metrics, list(header["methods"]))
    made = summary.as_json(rows, header)
    program.write_whole(out / "summary.json", json.dumps(made, indent=1) + "\n")
    text = "\n".join(
        [
            f"{header['model']['name']}, {header['engine']}, {header['device']}; {header['kind']} in {out}",
            "",
            summary.table(rows, the_kind.metrics),
            the_kind.report(records, header["methods"]),
            *summary.errors(records),
        ]
    )
    if to_json and to_json != "-":
        program.write_whole(to_json, json.dumps(made, indent=1) + "\n")
    if to_page:
        page.write([out], to_page)
    print(json.dumps(made, indent=1) if to_json == "-" else text.rstrip())
    return 0


def _again(given):
    header = folder.read_header(given.folder)
    if header["kind"] not in kind.KINDS:
        raise ValueError(f'{given.folder}: kind "{header["kind"]}" is none of {", ".join(kind.KINDS)}')
    path = pathlib.Path(given.folder)
    records = list(folder.read_items(path / "items.jsonl"))
    return _finish(path, header, kind.load(header["kind"]), records, given.json)


def main(argv=None):
    """Runs a command line, by default the process's. Returns its exit status; raises what goes wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        from .bench import commands

        commands.main(argv[1:])
        return 0
    parser = _parser()
    if not argv:
        parser.print_help()
        return 0
    given = parser.parse_args(argv)
    if given.kind == "table":
        return _again(given)
    if given.kind == "page":
        return page.write(given.folder, given.to, given.against, given.densities)
    if given.kind == "budgets":
        return budgets.run(given, _say)
    if given.kind == "learn":
        from .learn import command

        return command.run(given, argv, _say)
    if given.kind == "report":
        from . import report

        return report.write(given.folder, given.to)
    return _run(given, argv)


def run_main(argv=None):
    """Does what main() does, and tells what goes wrong in a line."""
    status = program.guarded(
        "pbsattn_eval",
        lambda: main(argv),
        ValueError,
        NotImplementedError,
        RuntimeError,
        MemoryError,
        interrupted="interrupted; nothing had begun",
    )
    if isinstance(status, str):
        _say(status)
        return 1
    return status
