"""budgets: for each head of a model a pattern of MInference's, so that outputs differ least at a density; as layer settings.

The search of MInference (arXiv 2407.02490, section 3.2) by the error of heads' outputs on texts of the user's. There each
head has the same budget; here all together have one, so that a head that needs more gets it from those that need less.
"""

import dataclasses
import json
import math

import pbsattn
from pbsattn.program import write_whole

from .kinds import ppl
from .tables import aligned

BLOCK = 128
SPLITS = (1.0, 0.75, 0.5, 0.25, 0.0)  # columns, as a share of a budget; the rest are diagonals
LEAST = 64  # tokens: the smallest budget; each next one is larger by the square root of 2
TOO_DENSE = 1.5  # of the density asked for: where a layer's heads have it on average, larger budgets aren't tried
_TOGETHER = 6  # layers whose queries, keys and values are kept at a time


def add_arguments(parser):
    ppl.add_documents(parser, "8192")
    parser.add_argument(
        "--density",
        type=float,
        default=0.25,
        help="share of causal blocks that the heads may compute, on average (default 0.25)",
    )
    parser.add_argument(
        "--to", required=True, metavar="FILE", help="the settings, as PBSATTN_SETTINGS and the package read them"
    )


def patterns(tokens, density):
    """Families of patterns, {name: options of each, from sparse to dense}."""
    budgets = [round(LEAST * 2 ** (step / 2)) for step in range(64) if LEAST * 2 ** (step / 2) < tokens]
    made: dict[str, list[dict[str, int | str]]] = {}
    for share in SPLITS:
        made[f"{share:.0%} columns"] = [
            {"vertical": round(budget * share), "slash": round(budget * (1 - share))} for budget in budgets
        ]
    rows = -(-tokens // BLOCK)

    def density_of(local):
        return sum(min(row + 1, 1 + local) for row in range(rows)) / (rows * (rows + 1) / 2)

    sizes = dict.fromkeys(round(2 ** (step / 2)) for step in range(64) if 2 ** (step / 2) < rows)
    made["A-shape"] = [
        {"keep": "none", "sink_blocks": 1, "local_blocks": local}
        for local in sizes
        if local == 1 or density_of(local) <= TOO_DENSE * density
    ]
    return made


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a head, or the mean of several."""

    error: float  # of its output, as a share of that of full attention
    density: float

    @classmethod
    def mean(cls, costs):
        return cls(sum(each.error for each in costs) / len(costs), sum(each.density for each in costs) / len(costs))


def search(engine, documents, density, say):
    """The settings, and what they cost: rows of a table. documents: lists of tokens; a head's cost is the mean over them."""
    families = patterns(max(len(ids) for ids in documents), density)
    settings, chosen = {"*": {"*": {"method": "minference"}}}, []
    layers = []  # of each: {(family, place in it): cost of each head}
    for first in range(0, engine.layers, _TOGETHER):
        some = range(first, min(first + _TOGETHER, engine.layers))
        say(f"layers {some.start} to {some.stop - 1} of {engine.layers}")
        captured = [engine.capture(ids, some) for ids in documents]
        layers += [_measure([of_layers[layer] for of_layers in captured], families, density) for layer in some]
    costs = [
        {pattern: of_heads[head] for pattern, of_heads in of_layer.items()}
        for of_layer in layers
        for head in range(len(next(iter(of_layer.values()))))
    ]
    picked = choose(costs, density)
    heads = len(costs) // len(layers)
    for i, (family, place) in enumerate(picked):
        settings.setdefault(str(i // heads), {})[str(i % heads)] = families[family][place]
        chosen.append((family, costs[i][family, place]))
    alike = {
        pattern: [of_head[pattern] for of_head in costs]
        for pattern in costs[0]
        if all(pattern in of_head for of_head in costs)
    }
    family, place = best({pattern: Cost.mean(of_heads) for pattern, of_heads in alike.items()}, density)
    lines = [("each head its own", [cost for _, cost in chosen])]
    lines += [(f"  {name}", [cost for its, cost in chosen if its == name]) for name in families]
    options = ", ".join(f"{name} {value}" for name, value in families[family][place].items())
    lines += [(f"one for all: {options}", alike[family, place])]
    table = [["", "heads", "error", "density"]]
    for name, of_heads in lines:
        if of_heads:
            mean = Cost.mean(of_heads)
            table.append([name, str(len(of_heads)), f"{mean.error:.4f}", f"{mean.density:.3f}"])
    return settings, table


def choose(costs, density):
    """A pattern for each head, of least error together at a mean density of at most this; else the sparsest of each.

    costs: of each head, {pattern: Cost}. Heads pay the same price for density, the lowest at which they keep to it together.
    """

    def at(price):
        return [
            min(of_head, key=lambda pattern: of_head[pattern].error + price * of_head[pattern].density) for of_head in costs
        ]

    def fits(picked):
        return Cost.mean([of_head[pattern] for of_head, pattern in zip(costs, picked)]).density <= density

    low, high = 1e-6, 1e6
    for _ in range(60):
        price = math.sqrt(low * high)
        low, high = (low, price) if fits(at(price)) else (price, high)
    return at(high)


def best(costs, density):
    """The pattern of least error at a density of at most this; where none fits, the sparsest."""
    fitting = [pattern for pattern, cost in costs.items() if cost.density <= density]
    if not fitting:
        return min(costs, key=lambda pattern: costs[pattern].density)
    return min(fitting, key=lambda pattern: costs[pattern].error)


def _measure(documents, families, density):
    """{(family, place in it): cost of each head} of a layer; documents: what capture() gives of it, for each."""
    full = [_full(*document) for document in documents]
    made = {}
    for family, patterns_ in families.items():
        for place, options in enumerate(patterns_):
            of_documents = [_cost(document, options, its) for document, its in zip(documents, full)]
            made[family, place] = [Cost.mean(same) for same in zip(*of_documents)]
            if Cost.mean(made[family, place]).density > TOO_DENSE * density:
                break
    return made


def _full(q, k, v, scale):
    """Output of full attention, and its norm by head."""
    out = pbsattn.attention(q, k, v, method="full", scale=scale)[0].float()
    return out, out.square().sum((1, 2)).sqrt()


def _cost(document, options, full_and_norm):
    """Of each head, under `minference` with some options; the last are those of _full()."""
    (q, k, v, scale), (full, norm) = document, full_and_norm
    out, trace = pbsattn.trace(q, k, v, method="minference", scale=scale, **options)
    error = (out[0].float() - full).square().sum((1, 2)).sqrt() / norm
    kept = trace.kept[0]
    density = kept.sum((1, 2)) / kept[0].new_ones(kept[0].shape).tril().sum()
    return [Cost(*pair) for pair in zip(error.tolist(), density.tolist())]


def run(given, say):
    """The command: writes the settings and prints what they cost."""
    from . import engines

    if not 0 < given.density <= 1:
        raise ValueError(f"--density {given.density}: a share of blocks, above 0 and up to 1")
    given.engine = engines.Engine.name
    engines.fill_in(given)
    documents = [(path, tokens) for _, path, tokens in ppl.documents(given)]
    for path, _ in documents:
        ppl.read_text(path)
    engine = engines.make(given, say)
    settings, rows = search(engine, [ppl.document(engine, path, tokens) for path, tokens in documents], given.density, say)
    write_whole(given.to, json.dumps(settings, indent=1) + "\n")
    print(aligned(rows, left=rows[0][:1]))
    return 0
