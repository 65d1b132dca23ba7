"""Prompts of the benchmark as token ids: a text's, random ones, and pbsattn_eval's codes hidden in long texts."""

import argparse
import gzip
import json
import pathlib

import numpy as np

Needle = dict  # item, tokens, depth, code, ids


def of_text(model: str, text: str | None, count: int) -> list[int]:
    """The first tokens of a text, by default of Python's standard library; random ones where the model has no tokenizer."""
    if not (pathlib.Path(model) / "tokenizer.json").exists():
        return np.random.default_rng(0).integers(3, 30_000, count).tolist()
    import tokenizers

    from pbsattn_eval import models

    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(model) / "tokenizer.json"))
    whole = pathlib.Path(text).read_text(encoding="utf-8") if text else models.python_source()
    ids: list[int] = []
    for at in range(0, len(whole), 1 << 16):
        ids += tokenizer.encode(whole[at : at + (1 << 16)], add_special_tokens=False).ids
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(f"{text or 'Python'}: {len(ids)} tokens, {count} needed; pass a longer --text")


def needles(model: str, path: str | None, cells: dict[int, int], seed: int = 0) -> list[Needle]:
    """Prompts that hide codes, {tokens: prompts}; made by pbsattn_eval, or read from a file that `save` wrote."""
    if path and pathlib.Path(path).exists():
        return json.loads(gzip.decompress(pathlib.Path(path).read_bytes()))
    import transformers

    from pbsattn_eval.answers import Texts
    from pbsattn_eval.kinds.needle import Kind

    engine = Texts()
    engine.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    made = []
    for tokens, depths in cells.items():
        kind, given = Kind(), argparse.ArgumentParser()
        kind.add_arguments(given)
        options = given.parse_args(
            ["--lengths", str(tokens), "--depths", str(depths), "--question", "end", "--seed", str(seed)]
        )
        kind.check(options)
        for item in kind.items(options, engine):
            code, ids, *_ = kind.prompt(engine, item)
            made.append(dict(item=item.id, tokens=tokens, depth=item.params["depth"], code=code, ids=ids))
    return made


def save(path: str, made: list[Needle]) -> None:
    """Writes needles to a file, so that who measures needs no time to make them."""
    pathlib.Path(path).write_bytes(gzip.compress(json.dumps(made, separators=(",", ":")).encode()))


def random_requests(
    count: int, most: int, most_answer: int, seed: int, vocabulary: int
) -> list[tuple[list[int], int, int | None]]:
    """Prompts of 1 to `most` tokens, evenly by the logarithm, of which two in five begin with one of four prefixes; the
    tokens to make, 1 to `most_answer`; and of one in twenty the step after which it is aborted."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(3, vocabulary, size).tolist() for size in (500, 2000, 6000, 16_000)]
    made = []
    for _ in range(count):
        tokens = int(np.exp(rng.uniform(0, np.log(most))))
        ids = rng.integers(3, vocabulary, tokens).tolist()
        if rng.random() < 0.4:
            ids = (prefixes[int(rng.integers(4))] + ids)[:most]
        make = int(rng.integers(1, most_answer + 1))
        made.append((ids, make, int(rng.integers(1, 60)) if rng.random() < 0.05 else None))
    return made
