"""Measures the plug-in in vLLM beside vLLM's FlashAttention, in one engine in this process, whose rows take turns.

    ./dev bench vllm --model FOLDER --json results.json            every part
    ./dev bench vllm --model FOLDER --parts first,itl --eager      some, without CUDA graphs and torch.compile

A run with the same --json goes on where it was stopped. Run it alone on a machine: it takes --memory of the GPU."""

import argparse
import datetime
import pathlib
import re
import shlex
import sys


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def cells(text: str) -> dict[int, int]:
    return {int(tokens): int(count) for tokens, count in (each.split(":") for each in text.split(","))}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    names = ("first", "itl", "load", "together", "needles", "random")
    parser = argparse.ArgumentParser(prog="./dev bench vllm", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that vLLM loads")
    parser.add_argument("--json", default="build/vllm.json", help="of the records (default build/vllm.json)")
    parser.add_argument("--parts", default=",".join(names), help="of " + ", ".join(names) + " (default all)")
    parser.add_argument(
        "--methods",
        default="auto",
        help="of the plug-in, as auto,pbs:top_p=0.9; NAME.pbs[:OPTION=VALUE] is auto with that order",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART=METHODS", help="methods of one part, in the place of --methods"
    )
    parser.add_argument("--text", help="a text for the prompts (default the source of Python's library)")
    parser.add_argument("--lengths", type=numbers, default=[8192, 32_768, 131_072], help="of `first` (8192,32768,131072)")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step (8192)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each, in turns (3)")
    parser.add_argument("--least", type=int, default=2560, help="PBSATTN_MIN_TOKENS (2560)")
    parser.add_argument("--long", type=int, default=24, help="long prompts of `load` (24), among three times as many short")
    parser.add_argument("--make", type=int, default=128, help="tokens of each answer in `load` (128)")
    parser.add_argument("--load", type=float, default=1.3, help="of what FlashAttention serves of long prompts alone (1.3)")
    parser.add_argument(
        "--needles",
        type=cells,
        default={32_768: 34, 65_536: 16, 130_816: 10},
        help="TOKENS:PROMPTS,... of `needles`, those that leave room for an answer (32768:34,65536:16,130816:10)",
    )
    parser.add_argument("--prompts", help="a file of needles; with --prepare it is written")
    parser.add_argument("--prepare", action="store_true", help="only write --prompts, without vLLM")
    parser.add_argument("--requests", type=int, default=200, help="of `random` (200)")
    parser.add_argument("--longest", type=int, default=65_536, help="prompt of `random` (65536)")
    parser.add_argument("--answer", type=int, default=256, help="most tokens of an answer in `random` (256)")
    parser.add_argument("--cache", type=int, default=75_000, help="tokens of the KV cache in `random` (75000)")
    parser.add_argument("--memory", type=float, default=0.92, help="gpu_memory_utilization (.92)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs (1)")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and torch.compile")
    parser.add_argument("--block-size", type=int, help="tokens of a page (vLLM's default)")
    parser.add_argument("--backend", default="CUSTOM", help="attention_backend (CUSTOM)")
    parser.add_argument("--load-format", default="auto", help="vLLM's; dummy for random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so many, from the engine's start on")
    parser.add_argument("--commit", help="what to write as the commit (default that of the source tree)")
    given = parser.parse_args(arguments)
    given.parts, given.methods = given.parts.split(","), [method for method in given.methods.split(",") if method]
    given.only = {part: methods.split(",") for part, _, methods in (each.partition("=") for each in given.only)}
    if unknown := [part for part in (*given.parts, *given.only) if part not in names]:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(names)}")
    return given


def variables(method: str, least: int) -> dict[str, str]:
    """The plug-in's variables for a method of --methods."""
    learned, found, options = method.partition(".pbs")
    named = {"PBSATTN_LEARNED": learned + found, "PBSATTN_METHOD": f"auto{options}"} if found else {"PBSATTN_METHOD": method}
    return {**named, "PBSATTN_MIN_TOKENS": str(least)}


def command(arguments: list[str]) -> str:
    """The command of a record: files by name, wherever they lie on this machine."""
    return shlex.join(["./dev", "bench", "vllm", *(re.sub(r"(^|[,=])/[^,=]*/", r"\1", each) for each in arguments)])


def main() -> None:
    given = parse()
    import prompts

    if given.prepare:
        prompts.save(given.prompts, prompts.needles(given.model, None, given.needles))
        return
    import torch
    import transformers
    import vllm
    from parts import PARTS
    from records import Records, say
    from served import Served

    import pbsattn

    config = transformers.AutoConfig.from_pretrained(given.model)
    given.most_len, given.vocabulary = config.max_position_embeddings, config.vocab_size
    given.lengths = [tokens for tokens in given.lengths if tokens <= given.most_len]
    given.most = max(given.chunk, max(given.lengths) if "first" in given.parts else given.chunk)
    say(f"vLLM {vllm.__version__}, pbsattn {pbsattn.__version__}, PyTorch {torch.__version__}: {given}")
    ids = prompts.of_text(given.model, given.text, given.most_len)
    every = dict.fromkeys([*given.methods, *(method for methods in given.only.values() for method in methods)])
    methods = {pathlib.Path(method).name: variables(method, given.least) for method in every}
    given.methods = [pathlib.Path(method).name for method in given.methods]
    given.only = {part: [pathlib.Path(method).name for method in names] for part, names in given.only.items()}
    served = Served(
        given.model,
        methods,
        given.backend,
        dtype=given.dtype,
        enforce_eager=given.eager,
        max_model_len=given.most_len,
        max_num_batched_tokens=given.most,
        max_num_seqs=64,
        gpu_memory_utilization=given.memory,
        load_format=given.load_format,
        tensor_parallel_size=given.tensor_parallel,
        **({"block_size": given.block_size} if given.block_size else {}),
    )
    from pbsattn_eval.bench import records as shared

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else pbsattn.describe_cpu().processor
    origin = {
        "device": f"{name}, torch {torch.__version__}, vLLM {vllm.__version__}",
        "commit": given.commit or shared.commit(),
        "date": datetime.date.today().isoformat(),
        "command": command(sys.argv[1:]),
        "eager": given.eager,
        "block_size": served.block_size,
        "runner": served.runner,
        "tensor_parallel": given.tensor_parallel,
        "model": pathlib.Path(given.model).name,
    }
    records = Records(given.json, origin, given.seconds)
    failed = []
    for part in given.parts:
        try:
            PARTS[part](served, records, given, ids)
        except Exception as error:
            say(f"{part} FAILED: {type(error).__name__}: {error}")
            import traceback

            traceback.print_exc()
            failed.append(part)
            if served.core.scheduler.has_unfinished_requests():
                break  # the engine's state is unknown
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
