"""The table of results/vllm.md, which tools/readme.py makes from what `./dev bench vllm` measured."""

import statistics

# What each part measured, by its params.
WHAT = {
    "first": lambda p: (
        f"{p['tokens']:,} tokens, {'whole' if p['chunk'] == p['tokens'] else 'in chunks of ' + str(p['chunk'])}"
    ),
    "itl": lambda p: f"{p['requests']} of {p['tokens']:,} tokens at once",
    "load": lambda p: (
        f"{p['long']} prompts of {p['tokens']:,} tokens, {p['long_per_second']:.1f} a second, among {p['short']} short ones"
    ),
    "together": lambda p: f"{p['requests']} prompts of {p['tokens']:,} tokens at once",
    "needles": lambda p: f"{p['prompts']} codes in {p['tokens']:,} tokens",
    "random": lambda p: f"{p['requests']} requests of up to {p['longest']:,} tokens, {p['cache_tokens']:,} in the cache",
}
FLASH = "flash"


def shown(record, value):
    """A value in its unit: times below a second in milliseconds, memory in GiB."""
    unit = record["unit"]
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.{0 if value >= 0.1 else 1 if value >= 0.01 else 2}f} ms"
    if unit.endswith("B"):
        return f"{value / 2**30:.2f} GiB"
    return f"{value:,.0f} {unit}".strip() if float(value).is_integer() or unit == "1/s" else f"{value:.3f} {unit}"


def vllm_table(records):
    """For each run of the benchmark its rows: a method's measurement beside FlashAttention's of the same case."""
    parts = []

    def run_of(record):
        return record["commit"], record["block_size"], record.get("tensor_parallel", 1)

    for run in dict.fromkeys(map(run_of, records)):
        rows = [record for record in records if run_of(record) == run]
        first = rows[0]
        spread = [record["spread"] for record in rows if record["runs"] > 1]
        gpus = f"{run[2]} GPUs, " if run[2] > 1 else ""
        graphs = "without CUDA graphs" if first["eager"] else "CUDA graphs and torch.compile"
        parts.append(
            f"{first['model']}. {gpus}{first['device']}, commit {first['commit']}, {first['date']}; pages of "
            f"{first['block_size']} tokens, {graphs}, runner `{first['runner']}`; spread of turns "
            f"{statistics.median(spread):.0%} in the median, {max(spread):.0%} at most:\n\n"
            "| part | what | measured | FlashAttention | method | it | better |\n"
            "| --- | --- | --- | --- | --- | --- | --- |"
        )

        def key(record):
            return str(record["params"]), record["metric"]

        theirs = {key(record): record for record in rows if record["case"] == FLASH}
        for record in rows:
            params, flash = record["params"], theirs.get(key(record))
            if record["case"] == FLASH:
                continue
            ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f}x"
            parts[-1] += (
                f"\n| {params['part']} | {WHAT[params['part']](params)} | {record['metric']} | "
                f"{'' if flash is None else shown(flash, flash['value'])} | `{record['case']}` | "
                f"{shown(record, record['value'])} | {ratio} |"
            )
    return "\n\n".join(parts)
