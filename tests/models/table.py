"""What is told of the answers: a line each, a page of all."""

from trial import MATTERS, RUNS, TOLERANCE, WORKS


def faults(answer):
    """What is wrong with a class, by run: the reasons why a sweep fails."""
    if "failed" in answer:
        return {"whole": answer["failed"].strip()} if WORKS in answer["said"] else {}
    found = {}
    if not answer.get("after", 0) <= TOLERANCE:
        found["whole"] = f"changed by {answer['after']:.1e} after a refusal"
    for name, run in answer.get("runs", {}).items():
        if "raises" in run and not run["raises"].startswith("NotImplementedError"):
            found[name] = run["raises"]
        elif not run.get("error", 0) <= TOLERANCE:
            found[name] = f"{run['error']:.1e}"
        elif not run.get("after", 0) <= TOLERANCE:
            found[name] = f"{run['after']:.1e} once disabled"
    return found


def wrong(answer):
    return bool(faults(answer))


def untested(answer):
    """Why a class counts as not built; None if it was."""
    if "failed" in answer:
        return answer["failed"].strip()
    if "runs" in answer and 0 < (answer["matters"] or 0) < MATTERS:
        return f"a wrong attention changes its logits by {answer['matters']:.0e} only"
    return None


def worst(answer):
    return max((run["error"] for run in answer.get("runs", {}).values() if "error" in run), default=None)


def cell(answer, name):
    """What became of a run, without the reasons."""
    if "refused" in answer:
        return "refused"
    run = answer["runs"].get(name, {"unable": ""})
    if name in faults(answer):
        return f"**WRONG** {faults(answer)[name]}"
    if "unable" in run:
        return "–"
    if "raises" in run:
        return "raises"
    if answer["matters"] == 0:
        return "not reached"
    if not run["taken"]:
        return "handed over"
    return f"computed, {run['left']} of {run['left'] + run['taken']} handed over" if run["left"] else "computed"


def reasons(answer):
    """Why calls were handed over, runs weren't there, or the model was refused."""
    if "refused" in answer:
        return answer["refused"].split(": ", 1)[-1]
    said = {}
    for name, run in answer["runs"].items():
        for reason in [*run.get("reasons", []), *(run[key] for key in ("raises", "unable") if key in run)]:
            said.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(runs) if len(runs) < len(RUNS) else 'all'}: {reason}" for reason, runs in said.items())


def line(answer):
    if (why := untested(answer)) is not None:
        if wrong(answer):
            return f"{answer['name']}: WRONG: {why}"
        return f"{answer['name']}: not built: {why}"
    if "refused" in answer:
        return f"{answer['name']}: refused: {answer['refused']}"
    cells = ", ".join(f"{name} {cell(answer, name).replace('**', '')}" for name in RUNS)
    error = "" if worst(answer) is None else f"; worst error {worst(answer):.1e}"
    noise = "" if answer["noise"] is None else f"; own noise {answer['noise']:.1e}"
    return f"{answer['name']}: {cells}{error}{noise}"


def summary(answers):
    built = [answer for answer in answers if untested(answer) is None]
    decoders = [answer for answer in answers if answer["kind"] == "decoder"]
    bad = [answer["name"] for answer in answers if wrong(answer)]
    return (
        f"{len(answers)} classes: {sum(answer in built for answer in decoders)} of {len(decoders)} decoders and "
        f"{sum(answer not in decoders for answer in built)} of {len(answers) - len(decoders)} others built; "
        f"{sum('refused' in answer for answer in built)} refused; {len(bad)} wrong{': ' if bad else ''}{', '.join(bad)}"
    )


def _escaped(text):
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(answers):
    built = [answer for answer in answers if untested(answer) is None]
    rows = [
        "| class | family | kind | " + " | ".join(RUNS) + " | worst error | own noise | why |",
        "| --- | --- | --- |" + " --- |" * (len(RUNS) + 3),
    ]
    for answer in built:
        error, noise = worst(answer), answer["noise"]
        rows.append(
            f"| `{answer['name']}` | {answer['family']} | {answer['kind']} | "
            + " | ".join(cell(answer, name) for name in RUNS)
            + f" | {'' if error is None else f'{error:.0e}'} | {'' if noise is None else f'{noise:.0e}'} | "
            + _escaped(reasons(answer))
            + " |"
        )
    missing = [
        f"| `{answer['name']}` | {answer['family']} | {answer['kind']} | "
        f"{'**WRONG** ' * wrong(answer)}{_escaped(untested(answer))} |"
        for answer in answers
        if untested(answer) is not None
    ]
    return "\n".join(
        [
            *HEAD,
            "",
            summary(answers) + ".",
            "",
            *rows,
            "",
            "## Not built",
            "",
            "| class | family | kind | reason |",
            "| --- | --- | --- | --- |",
            *missing,
            "",
        ]
    )


HEAD = """# What becomes of transformers' classes

Made by `python tests/models --all --table results/models.md`; not to be edited.

A tiny random model of each class, float32, 200 tokens, `pbsattn.transformers.enable(model, top_p=1, min_tokens=64)` against the
model's own attention before; against its eager one where logits are capped, which SDPA ignores, and where layers carry sinks, windows or values of
another width (`CARRYING` in `tests/models/cases.py`). Runs: *whole*; *padded*, on the left, beside a row without; in *chunks* of 90, 80, 29 and 1 tokens over a cache; over a
*static* cache, 150, 49 and 1 tokens; *shared*, where a second model of the same config object must not change while the first is enabled and sparse.

*computed*: by pbsattn. *handed over*: to the model's own attention or SDPA, for the reason in the last column, or because no call was
long. *refused*: by `enable()`, with that message. *–*: the model itself can't, without pbsattn; the last column tells why. *Worst error* is the largest
difference of any logit in any run, as a share of the largest logit; above 1e-4 is wrong. *Own noise* is the same of the model's own
attention in float32 against float64. Every class listed as built, and not refused, changes by at least 1e-3 if its attention is
wrong on purpose (its logits not capped, or halved); where that changes nothing, the class doesn't ask transformers for its attention at all (*not reached*).
""".splitlines()  # noqa: E501
