"""tasks: questions on long documents, from files in the format of L-Eval or LongBench."""

import dataclasses
import hashlib
import pathlib
import re

from .. import folder, kind
from . import scores

LEVAL = {"input": str, "instructions": list, "outputs": list, "evaluation": str}
LONGBENCH = {"input": str, "context": str, "answers": list}

# What is said around a document and a question. "plain" goes to the model as it is, the others as a user's message.
PROMPTS = {
    "question": "Read the text and answer the question about it in as few words as possible.\n\n{document}\n\n"
    "Question: {question}\nAnswer in as few words as possible.",
    "exam": "Read the text and answer the question about it. Where options are given, answer with the letters of the right "
    "ones alone, as B or AC.\n\n{document}\n\nQuestion: {question}",
    "truth": "Read the text and answer the question about it with True or False.\n\n{document}\n\nQuestion: {question}",
    "summary": "Summarise the text below.\n\n{document}\n\n{question}",
    "number": "{document}\n\n{question}\nAnswer with the number alone.",
    "plain": "{document}{question}",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a set is asked and scored."""

    prompt: str
    score: str  # a function of scores
    answer_tokens: int


_QA, _SUMMARY, _CODE = Rule("question", "f1", 64), Rule("summary", "rouge_l", 400), Rule("plain", "code", 64)
LONGBENCH_SETS = {
    "narrativeqa": _QA,
    "qasper": _QA,
    "multifieldqa_en": _QA,
    "hotpotqa": _QA,
    "2wikimqa": _QA,
    "musique": _QA,
    "triviaqa": Rule("plain", "f1", 32),
    "trec": Rule("plain", "classes", 64),
    "samsum": Rule("plain", "rouge_l", 128),
    "gov_report": _SUMMARY,
    "qmsum": _SUMMARY,
    "multi_news": _SUMMARY,
    "passage_count": Rule("number", "numbers", 16),
    "passage_retrieval_en": Rule("number", "numbers", 16),
    "lcc": _CODE,
    "repobench-p": _CODE,
}


def _leval_rule(evaluation, expected):
    """The rule of one question of L-Eval, by the kind of its answer; None for what only a judge can score."""
    if evaluation == "exam":
        if re.match(r"\(?[A-F]{1,6}\b", expected):
            return Rule("exam", "choice", 16)
        return Rule("truth", "truth", 16) if re.match("true|false", expected.lower()) else Rule("question", "exact", 32)
    return {"f1": _QA, "rouge": _SUMMARY}.get(evaluation)


@dataclasses.dataclass
class Question:
    document: str
    question: str
    expected: list[str]
    rule: Rule | None
    classes: list[str] = dataclasses.field(default_factory=list)
    why_not: str = ""  # where there is no rule


def _wrong(path, line, field, problem):
    return folder.FolderError(f'{path}, line {line}: field "{field}" {problem}')


def _texts(path, line, row, field):
    values = row[field]
    if not values or not all(isinstance(each, str) for each in values):
        raise _wrong(path, line, field, "has to be a list of texts, with one at least")
    return values


def read(path):
    """(line, number in the line, Question) of a file of either format. FolderError names line and field of what is wrong."""
    first = next(folder.read_jsonl(path, {}), None)
    if first is None:
        raise folder.FolderError(f"{path}: is empty; each line has to be a JSON object")
    line, row = first
    form = LEVAL if "instructions" in row else LONGBENCH if "context" in row else None
    if form is None:
        raise folder.FolderError(
            f'{path}, line {line}: has neither field "instructions" (L-Eval) nor "context" (LongBench), '
            f"but {', '.join(sorted(row)) or 'none'}"
        )
    for line, row in folder.read_jsonl(path, form):
        if form is LEVAL:
            asked, expected = _texts(path, line, row, "instructions"), _texts(path, line, row, "outputs")
            if len(asked) != len(expected):
                raise _wrong(path, line, "outputs", f"has {len(expected)} texts for {len(asked)} instructions")
            for i, (question, answer) in enumerate(zip(asked, expected)):
                rule = _leval_rule(row["evaluation"], answer)
                why = f'its evaluation "{row["evaluation"]}" needs a judge; exam, f1 and rouge are scored here'
                yield line, i, Question(row["input"], question, [answer], rule, why_not=why)
        else:
            name = row.get("dataset", pathlib.Path(path).stem)
            rule = LONGBENCH_SETS.get(str(name).removesuffix("_e"))
            if rule is None:
                raise _wrong(path, line, "dataset", f'is "{name}", none of {", ".join(LONGBENCH_SETS)}')
            classes = row.get("all_classes") or []
            if rule.score == "classes" and not classes:
                raise _wrong(path, line, "all_classes", f"is missing; {name} is scored by it")
            yield line, 0, Question(row["context"], row["input"], _texts(path, line, row, "answers"), rule, classes)


class Kind(kind.AskingKind):
    metrics = (kind.Metric("score", "%", "{:.1f}"),)

    def add_arguments(self, parser):
        parser.add_argument(
            "--data",
            required=True,
            metavar="FOLDER",
            help="a folder of .jsonl files, each of L-Eval's or LongBench's format",
        )
        parser.add_argument("--sets", metavar="NAME,...", help="files of it, without .jsonl (default all)")
        parser.add_argument("--most", type=int, metavar="N", help="questions of each set, the first ones (default all)")
        parser.add_argument(
            "--most-tokens",
            type=int,
            default=32768,
            metavar="N",
            help="of a prompt; a longer document loses its middle, as in LongBench (default 32768)",
        )

    def check(self, given):
        self._files = self._find(given)
        if given.most is not None and given.most < 1:
            raise ValueError(f"--most {given.most}: at least 1")
        if given.most_tokens < 512:
            raise ValueError(f"--most-tokens {given.most_tokens}: at least 512")
        self._questions = {path: list(read(path)) for path in self._files}
        if any(q.rule and q.rule.score == "rouge_l" for questions in self._questions.values() for _, _, q in questions):
            scores.rouge_l("a", ["a"])  # which says now, not after hours, that it lacks its library

    @staticmethod
    def _find(given):
        data = pathlib.Path(given.data)
        found = {path.stem: path for path in sorted(data.glob("*.jsonl"))}
        if not found:
            problem = "has no .jsonl files" if data.is_dir() else "no such folder"
            raise ValueError(f"--data {data}: {problem}; name a folder of such files")
        names = given.sets.split(",") if given.sets else list(found)
        if unknown := [name for name in names if name not in found]:
            raise ValueError(f"--sets {given.sets}: {data} has no {unknown[0]}.jsonl; it has {', '.join(found)}")
        return [found[name] for name in names]

    def identity(self, name, value):
        if name != "data":
            return value
        return [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]} for path in self._files]

    def items(self, given, engine):
        made = []
        for path, questions in self._questions.items():
            for line, number, question in questions[: given.most]:
                params = dict(set=path.stem, line=line, question=number, most_tokens=given.most_tokens)
                made.append(kind.Item(f"{path.stem}-{line}-{number}", path.stem, params, question))
        return made

    def prompt(self, engine, item):
        """The tokens of a prompt."""
        question, most = item.data, item.params["most_tokens"]
        encode = engine.encode if question.rule.prompt == "plain" else engine.chat

        def form(document):
            return encode(PROMPTS[question.rule.prompt].format(document=document, question=question.question))

        ids = form(question.document)
        if len(ids) <= most:
            return ids
        room = most - len(form("")) - 16  # tokens may join otherwise at the seams
        document = engine.encode(question.document)
        if room < 2:
            raise kind.Unsupported(f"its question alone takes {len(form(''))} of {most} tokens")
        half = room // 2
        return form(engine.decode(document[:half]) + engine.decode(document[-half:]))

    def ask(self, engine, item):
        if item.data.rule is None:
            raise kind.Unsupported(item.data.why_not)
        return None, self.prompt(engine, item), item.data.rule.answer_tokens

    def measure(self, engine, item, attention, state):
        question, (_, answers) = item.data, state
        answer = kind.answered(answers[attention.name])
        arguments = [question.classes] if question.rule.score == "classes" else []
        score = getattr(scores, question.rule.score)(answer.text, question.expected, *arguments)
        return kind.answer_record(answer, question.expected, score)
