"""How an answer is scored: each function gives a share from 0 to 1."""

import difflib
import re
import string


def held(answer, expected, any_will_do=False):
    """RULER's score: the share of the expected strings that the answer holds, or whether it holds any."""
    found = [each.lower() in answer.lower() for each in expected]
    return float(any(found)) if any_will_do else sum(found) / len(found)


def exact(answer, expected):
    """Whether the answer is one of the expected, but for case, articles and punctuation (SQuAD's rule)."""
    from transformers.data.metrics.squad_metrics import compute_exact

    return float(max(compute_exact(each, answer) for each in expected))


def f1(answer, expected):
    """The best F1 of words that the answer and an expected one share (SQuAD's rule)."""
    from transformers.data.metrics.squad_metrics import compute_f1

    return float(max(compute_f1(each, answer) for each in expected))


def rouge_l(answer, expected):
    """The best F1 of the longest common subsequence, as LongBench measures it."""
    try:
        import rouge
    except ImportError:
        raise ValueError("ROUGE-L needs the package rouge; pip install rouge, or leave out the sets that need it") from None
    if not answer.strip(string.punctuation + string.whitespace):
        return 0.0
    return float(max(rouge.Rouge(["rouge-l"]).get_scores([answer], [each])[0]["rouge-l"]["f"] for each in expected))


def _letters(text):
    """The first option letters of a text: of "(B) since ...", "BD" or "A, C and D"."""
    found = re.search(r"\b(?:[A-F](?:(?:, ?| and | & )[A-F])+|[A-F]{1,6})\b", text)
    return set(re.findall("[A-F]", found[0])) if found else set()


def choice(answer, expected):
    """Whether the options chosen are those of an expected answer."""
    return float(any(_letters(answer) == _letters(each) for each in expected))


def truth(answer, expected):
    """Whether the first "true" or "false" of the answer is that of an expected one ("True [fact: False]": by the text)."""

    def first(text):
        return next(iter(re.findall(r"true|false", text.lower())), None)

    return float(first(answer) is not None and any(first(answer) == first(each) for each in expected))


def classes(answer, expected, every_class):
    """Whether the answer names the expected class, divided by how many it names (LongBench)."""
    named = [each for each in every_class if each in answer]
    named = [each for each in named if not any(each != other and each in other and other in expected for other in named)]
    return float(max((1 / len(named) if each in named else 0.0) for each in expected)) if named else 0.0


def numbers(answer, expected):
    """The share of the answer's numbers that are the expected one (LongBench's counting and retrieval)."""
    found = re.findall(r"\d+", answer)
    wanted = {number[0] for each in expected if (number := re.search(r"\d+", each))}
    return sum(each in wanted for each in found) / len(found) if found else 0.0


def code(answer, expected):
    """How alike the answer's first line of code and the expected one are (LongBench)."""
    lines = [line for line in answer.lstrip("\n").split("\n") if not re.search(r"`|#|//", line)]
    line = lines[0] if lines else ""
    return max(difflib.SequenceMatcher(None, line, each).ratio() for each in expected)
