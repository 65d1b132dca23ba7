"""eval ruler: prompts of RULER's 13 task types, scored as RULER scores them: by what the answer holds."""

from . import haystack, kind, scores
from .needle import add_prompts, filler_identity, names, numbers
from .ruler_tasks import TASKS


class Kind(kind.KindBase):
    metrics = (kind.Metric("score", "%", "{:.1f}"),)

    def add_arguments(self, parser):
        add_prompts(parser, "16384")
        parser.add_argument("--tasks", default=",".join(TASKS), metavar="TASK,...", help=f"of {', '.join(TASKS)} (default all)")
        parser.add_argument("--samples", type=int, default=10, metavar="N", help="prompts of each task and length (default 10)")

    def check(self, given):
        numbers("--lengths", given.lengths, 1024, 1 << 24)
        if given.samples < 1:
            raise ValueError(f"--samples {given.samples}: at least 1")
        names("--tasks", given.tasks, TASKS)
        self._filler = haystack.Filler(given.filler)

    identity = staticmethod(filler_identity)

    def items(self, given, engine):
        made = []
        for tokens in numbers("--lengths", given.lengths, 1024, 1 << 24):
            for task in given.tasks.split(","):
                for sample in range(given.samples):
                    name = f"{task}-{tokens}-{sample}"
                    params = dict(task=task, tokens=tokens, sample=sample)
                    made.append(kind.Item(name, f"{task} {tokens}", params, (given.seed, name)))
        return made

    def prompt(self, engine, item):
        """The task's prompt, and its tokens with the beginning of the answer."""
        task, tokens = item.params["task"], item.params["tokens"]
        prompt = TASKS[task](haystack.item_random(*item.data), self._filler.take)
        try:
            ids, _ = haystack.fit(prompt.build, tokens, lambda text: engine.chat(text, prompt.begun))
        except ValueError as error:
            raise kind.Unsupported(str(error)) from None
        return prompt, ids

    def prepare(self, engine, item, attentions):
        prompt, ids = self.prompt(engine, item)
        return prompt, engine.answers(ids, attentions, prompt.answer_tokens)

    def measure(self, engine, item, attention, state):
        prompt, answers = state
        answer = kind.answered(answers[attention.name])
        score = scores.held(answer.text, prompt.expected, prompt.any_will_do)
        return {"metrics": {"score": 100 * score}, "density": answer.density, "seconds": answer.seconds,
                "answer": answer.text, "expected": prompt.expected}
