"""ruler: prompts of RULER's 13 task types, scored as RULER scores them: by what the answer holds."""

from .. import kind
from . import haystack, scores
from .prompts import PromptKind, names
from .ruler_tasks import TASKS


class Kind(PromptKind):
    metrics = (kind.Metric("score", "%", "{:.1f}"),)
    lengths, least = "16384", 1024
    counts = (("samples", 10, "prompts of each task and length"),)

    def add_arguments(self, parser):
        super().add_arguments(parser)
        parser.add_argument(
            "--first", type=int, default=0, metavar="N", help="number of the first sample, for parts of a run (default 0)"
        )
        parser.add_argument(
            "--tasks", default=",".join(TASKS), metavar="TASK,...", help=f"of {', '.join(TASKS)} (default all)"
        )

    def check(self, given):
        super().check(given)
        names("--tasks", given.tasks, TASKS)
        if given.first < 0:
            raise ValueError(f"--first {given.first}: at least 0")

    def items(self, given, engine):
        made = []
        for tokens in self.tokens(given):
            for sample in range(given.first, given.first + given.samples):  # tasks in turn: a stopped run has of each
                for task in given.tasks.split(","):
                    name = f"{task}-{tokens}-{sample}"
                    params = dict(task=task, tokens=tokens, sample=sample)
                    made.append(kind.Item(name, f"{task} {tokens}", params, (given.seed, name)))
        return made

    def prompt(self, engine, item):
        """The task's prompt, and its tokens with the beginning of the answer."""
        task, tokens = item.params["task"], item.params["tokens"]
        prompt = TASKS[task](haystack.item_random(*item.data), self.filler.take)
        return prompt, self.fit(engine, prompt.build, tokens, prompt.begun)

    def ask(self, engine, item):
        prompt, ids = self.prompt(engine, item)
        return prompt, ids, prompt.answer_tokens

    def measure(self, engine, item, attention, state):
        prompt, answers = state
        answer = kind.answered(answers[attention.name])
        score = scores.held(answer.text, prompt.expected, prompt.any_will_do)
        return kind.answer_record(answer, prompt.expected, score)
