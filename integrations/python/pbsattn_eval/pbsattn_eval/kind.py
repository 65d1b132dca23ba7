"""What a kind of evaluation is: items to run, and what is measured on each under each attention."""

import dataclasses
import importlib

# Name: the module of kinds/ that holds its class `Kind`, and what it is.
KINDS = {
    "recall": "attention mass that a method's blocks hold, error of its output, by layer and head; the oracle as the bound",
    "ppl": "likelihood of long texts, and divergence from full attention, token by token",
    "needle": "codes hidden in long texts, one of which is asked for, by depth and length",
    "ruler": "RULER's 13 task types: needles, variable tracking, common and frequent words, questions on documents",
    "tasks": "questions on long documents, from files in the format of L-Eval or LongBench",
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of each record. A table shows its mean, and for all but full its change against full."""

    name: str
    unit: str = ""
    form: str = "{:.4f}"  # how a table writes it
    change: bool = True  # whether its change against full means something (it doesn't where full's is a constant)


@dataclasses.dataclass
class Item:
    """One document, prompt or question, which every attention gets alike."""

    id: str  # unlike any other of the run, and the same whenever the run is made again
    group: str  # of the table: means are over the items of a group
    params: dict  # what it is, for the record: text, tokens, depth, ...
    data: object = None  # what measuring needs, and the record doesn't


class Unsupported(Exception):
    """An item can't be measured under an attention, or not with this model: recorded with the reason, and not counted."""


def answered(answer):
    """An answer of engine.answers, where the model gave one; else raises Unsupported."""
    if isinstance(answer, Unsupported):
        raise answer
    if not answer.text.strip():
        raise Unsupported("the model ended its turn without an answer")
    return answer


def answer_record(answer, expected, score):
    """The record of an answer whose score is in [0, 1]."""
    return {
        "metrics": {"score": 100 * score},
        "density": answer.density,
        "seconds": answer.seconds,
        "answer": answer.text,
        "expected": expected,
    }


class KindBase:
    """A kind's module derives its class `Kind` from this."""

    metrics: tuple[Metric, ...] = ()
    engines: tuple[str, ...] = ("transformers", "llama")

    def add_arguments(self, parser):
        """Adds the kind's own options. Whatever they are set to belongs to the run: run.json holds it."""

    def check(self, given):
        """Raises ValueError for options that make no sense, before a model is loaded. May read files."""

    def identity(self, name, value):
        """An option as run.json holds it: texts by name and hash, not by path."""
        return value

    def items(self, given, engine) -> list[Item]:
        """The run's items, in order, the same for the same options."""
        raise NotImplementedError

    def prepare(self, engine, item, attentions):
        """What the attentions of an item share; `attentions` are those that are still to measure. May raise Unsupported."""

    def prepared(self, engine, left):
        """For each (item, attentions) of `left`, in any order: (item, attentions, what prepare() gave, or Unsupported)."""
        for item, attentions in left:
            try:
                yield item, attentions, self.prepare(engine, item, attentions)
            except Unsupported as reason:
                yield item, attentions, reason

    def measure(self, engine, item, attention, state) -> dict:
        """The record of an item under an attention: {"metrics": {name: number}, ...}.

        `density` and `seconds` (of the prefill) belong in it where known. "units", {name: [numbers]}, are the parts that
        a metric is the mean of, such as blocks of tokens; intervals are then over all items' units. Raises Unsupported.
        """
        raise NotImplementedError

    def report(self, records, methods):
        """Text to print below the table; "" for none. `methods`: those of run.json, with every option's value."""
        return ""


class AskingKind(KindBase):
    """A kind that puts prompts to the model, several at a time where that is faster."""

    def ask(self, engine, item):
        """Returns what measure() needs to know of an item, its prompt's tokens, and how many an answer may have. May raise
        Unsupported."""
        raise NotImplementedError

    def prepared(self, engine, left):
        """measure() gets (what ask() said first, {attention's name: Answer, or Unsupported})."""
        asked, size = [], 0
        for item, attentions in left:
            try:
                known, ids, most = self.ask(engine, item)
            except Unsupported as reason:
                yield item, attentions, reason
                continue
            asked.append((item, known, (ids, attentions, most)))
            size += (tokens := len(attentions) * (len(ids) + most))
            if size + tokens > engine.room:  # another prompt like it has no room
                yield from self._answered(engine, asked)
                asked, size = [], 0
        yield from self._answered(engine, asked)

    @staticmethod
    def _answered(engine, asked):
        for (item, known, prompt), answers in zip(asked, engine.answers_to([prompt for _, _, prompt in asked])):
            yield item, prompt[1], (known, answers)


def load(name) -> KindBase:
    return importlib.import_module(f".kinds.{name}", __package__).Kind()
