"""needle: codes hidden in a long text, one of which is asked for."""

from .. import kind
from . import haystack
from .prompts import PromptKind, names

PLACES = ("end", "start", "long")
LONG_QUESTION = 500  # tokens
ANSWER_TOKENS = 10  # of a number of seven digits, and room for a word before it


class Kind(PromptKind):
    metrics = (kind.Metric("found", "%", "{:.1f}"),)
    lengths, least = "8192,16384,32768", 512
    counts = (
        ("depths", 12, "places of the code asked for, evenly from the beginning to the end of the text"),
        ("needles", 8, "codes hidden in each text"),
        ("repeats", 1, "prompts of each cell"),
    )

    def add_arguments(self, parser):
        super().add_arguments(parser)
        parser.add_argument(
            "--question",
            default="end,start,long",
            metavar="PLACE,...",
            help="end: a short question after the text; start: before it; long: after it, and "
            f"{LONG_QUESTION} tokens long, the thing asked for named at its beginning (default all three)",
        )

    def check(self, given):
        super().check(given)
        names("--question", given.question, PLACES)

    def items(self, given, engine):
        made = []
        for place in given.question.split(","):
            for tokens in self.tokens(given):
                for at in range(given.depths):
                    depth = at / max(given.depths - 1, 1)
                    for repeat in range(given.repeats):
                        name = f"{place}-{tokens}-{at}of{given.depths}-{repeat}"
                        params = dict(
                            question=place, tokens=tokens, depth=round(depth, 4), needles=given.needles, repeat=repeat
                        )
                        made.append(kind.Item(name, f"{place} {tokens}", params, (given.seed, name, depth, given.needles)))
        return made

    def ask(self, engine, item):
        code, ids, _ = self.prompt(engine, item)
        return code, ids, ANSWER_TOKENS

    def prompt(self, engine, item):
        """The code asked for, the prompt's tokens, and the beginning of the answer, which they end in."""
        seed, name, depth, count = item.data
        rng = haystack.item_random(seed, name)
        things = haystack.things(rng, count)
        codes = [haystack.number(rng) for _ in things]
        hidden = [
            (depth if i == 0 else rng.random(), f"The code of the {thing} is {code}.")
            for i, (thing, code) in enumerate(zip(things, codes))
        ]
        place, tokens = item.params["question"], item.params["tokens"]
        ask = f"What is the code of the {things[0]}?"
        intro = (
            f"Codes of things are hidden in the text below. {ask} Find the answer in the text.\n\n"
            if place == "start"
            else "Codes of things are hidden in the text below. Remember them; one will be asked for.\n\n"
        )
        outro = {"start": "", "end": f"\n\n{ask}", "long": f"\n\n{self._long(engine, seed, name, ask)}"}[place]
        begun = "The code is"

        def build(n):
            text = haystack.hide(self.filler.take(haystack.item_random(seed, name, "filler"), n), hidden)
            return intro + " ".join(text) + outro

        return codes[0], self.fit(engine, build, tokens, begun), begun

    @staticmethod
    def _long(engine, seed, name, ask):
        """The question with remarks after it, so that it lies far before the end."""

        def build(n):
            rng = haystack.item_random(seed, name, "remarks")
            remarks = " ".join(haystack.sentence(rng) for _ in range(n))
            return f"{ask} While you think of it, here are some remarks, none of which matters for your answer. {remarks}"

        return build(haystack.fit(build, LONG_QUESTION, engine.encode)[1])

    def measure(self, engine, item, attention, state):
        code, answers = state
        answer = kind.answered(answers[attention.name])
        return {
            "metrics": {"found": 100.0 * (code in answer.text)},
            "density": answer.density,
            "seconds": answer.seconds,
            "answer": answer.text,
            "expected": code,
        }

    def report(self, records, methods):
        """A line of depths for each group and method, and how much of what full finds each method finds."""
        scored = [r for r in records if "error" not in r]
        full = {r["item"] for r in scored if r["method"] == "full" and r["metrics"]["found"]}
        lines = ["found by depth, from the beginning of the text to its end (0 to 9: tenths of the prompts; * all):"]
        keyed, kept = {}, {}
        for r in scored:
            keyed.setdefault((r["group"], r["method"]), {}).setdefault(r["params"]["depth"], []).append(
                r["metrics"]["found"]
            )
            if r["item"] in full:
                kept.setdefault(r["method"], []).append(r["metrics"]["found"] > 0)
        width = max((len(f"{group}  {method}") for group, method in keyed), default=0)
        for (group, method), depths in keyed.items():
            shares = [sum(found) / len(found) / 100 for _, found in sorted(depths.items())]
            cells = "".join("*" if share == 1 else str(int(10 * share)) for share in shares)
            lines.append(f"  {f'{group}  {method}'.ljust(width)}  {cells}")
        lines.append("of what full finds:")
        lines += [
            f"  {method}: {sum(found)} of {len(found)} ({sum(found) / len(found):.1%})" for method, found in kept.items()
        ]
        return "\n".join(lines)
