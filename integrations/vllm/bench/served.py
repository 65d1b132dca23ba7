"""vLLM's engine in this process, with the plug-in, whose rows can be given to FlashAttention and back while it runs."""

import contextlib
import dataclasses
import os
import time
import typing

# Nothing is looked up, and the engine is in this process.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_HOST_IP="127.0.0.1",
    GLOO_SOCKET_IFNAME="lo",
    NCCL_SOCKET_IFNAME="lo",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    VLLM_USE_DEEP_GEMM="0",
)

FLASH = "flash"  # every row by vLLM's FlashAttention


@dataclasses.dataclass
class Request:
    """A prompt of token ids, how many tokens to make, when it comes, and after how many steps it is aborted."""

    ids: list[int]
    make: int
    at: float = 0.0  # seconds after the beginning
    abort: int | None = None


@dataclasses.dataclass
class Answer:
    """What came of a request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)  # seconds after it came, of each token
    best: list[dict[int, float]] = dataclasses.field(default_factory=list)  # two log-probabilities of each, if asked for

    @property
    def gaps(self) -> list[float]:
        """Seconds between its tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:])]


def attend_by(worker: typing.Any, variables: dict[str, str] | None) -> None:
    """Gives the plug-in of a worker other settings, as variables; None leaves every row to FlashAttention."""
    from pbsattn_vllm import taking
    from pbsattn_vllm.metadata import RowsBuilder

    every = (group for groups in worker.model_runner.attn_groups for group in groups)
    builders = [each for group in every for each in group.metadata_builders if isinstance(each, RowsBuilder)]
    if variables is None:
        for builder in builders:
            builder.left_alone()
        return
    for name in [name for name in os.environ if name.startswith("PBSATTN_")]:
        del os.environ[name]
    os.environ.update(variables)
    taking.settings.cache_clear()
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "impl"):
            vars(layer.impl).pop("pbsattn_layer", None)
    for builder in builders:
        builder.choose_rows()


def runner_of(worker: typing.Any) -> str:
    """Names the module of a worker's model runner."""
    return type(worker.model_runner).__module__


def reserved_of(worker: typing.Any) -> int:
    """Bytes that the plug-in reserved in a worker's process."""
    from pbsattn_vllm.memory import buffer

    return buffer.size


class Served:
    """One engine. `methods`: {name: variables of the plug-in}."""

    def __init__(self, model: str, methods: dict[str, dict[str, str]], backend: str, **options: typing.Any) -> None:
        from vllm import LLM

        os.environ.update(next(iter(methods.values()), {}))
        if backend:
            options["attention_backend"] = backend
        self.llm = LLM(
            model=model,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **options,
        )
        self.methods = methods
        self.core = self.llm.llm_engine.engine_core.engine_core
        self._count = 0

    @property
    def pool(self) -> typing.Any:
        """The KV cache's blocks."""
        return self.core.scheduler.kv_cache_manager.block_pool

    @property
    def block_size(self) -> int:
        """Tokens of a block of the KV cache."""
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    @property
    def runner(self) -> str:
        """The module of vLLM's model runner."""
        return self.llm.collective_rpc(runner_of)[0]

    @property
    def reserved(self) -> int:
        """Bytes that the plug-in reserved on each GPU, on the one with most."""
        return max(self.llm.collective_rpc(reserved_of))

    def attend(self, method: str) -> None:
        """Attends by a method of `methods`, or by FLASH, from now on; forgets the prefix cache."""
        self.llm.collective_rpc(attend_by, args=(None if method == FLASH else self.methods[method],))
        self.forget()

    def forget(self) -> None:
        """Empties the prefix cache. Steps that vLLM scheduled ahead may still hold blocks of what is answered."""
        for _ in range(10):
            if self.llm.reset_prefix_cache():
                return
            self.llm.llm_engine.step()
        raise RuntimeError("the prefix cache can't be emptied: requests are running")

    def chunks(self, tokens: int) -> None:
        """Lets a step have so many tokens, at most as many as the engine was made for."""
        self.core.scheduler.max_num_scheduled_tokens = tokens

    @contextlib.contextmanager
    def small_cache(self, tokens: int) -> typing.Iterator[None]:
        """Leaves so many tokens of the KV cache free for the length of a `with` block."""
        self.forget()
        held = self.pool.get_new_blocks(max(self.pool.get_num_free_blocks() - tokens // self.block_size, 0))
        try:
            yield
        finally:
            self.pool.free_blocks(held)

    @contextlib.contextmanager
    def preemptions(self) -> typing.Iterator[list[str]]:
        """The requests that are preempted in a `with` block."""
        kind, seen = type(self.core.scheduler), []
        preempt = kind._preempt_request

        def noted(scheduler: typing.Any, request: typing.Any, *rest: typing.Any, **named: typing.Any) -> typing.Any:
            seen.append(request.request_id)
            return preempt(scheduler, request, *rest, **named)

        kind._preempt_request = noted
        try:
            yield seen
        finally:
            kind._preempt_request = preempt

    def serve(self, requests: list[Request], logprobs: int | None = None) -> list[Answer]:
        """Answers requests greedily, each from when it comes on. Tokens of aborted ones are those that came before."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine, answers = self.llm.llm_engine, [Answer() for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].at)
        came, named, steps = {}, {}, 0
        start = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while waiting and requests[waiting[0]].at <= now:
                i = waiting.pop(0)
                name, self._count = f"bench-{self._count}", self._count + 1
                named[name], came[i] = i, start + requests[i].at
                parameters = SamplingParams(
                    temperature=0,
                    max_tokens=requests[i].make,
                    detokenize=False,
                    ignore_eos=True,
                    logprobs=logprobs,
                    output_kind=RequestOutputKind.DELTA,
                )
                engine.add_request(name, TokensPrompt(prompt_token_ids=requests[i].ids), parameters)
            if not engine.has_unfinished_requests():
                time.sleep(max(requests[waiting[0]].at - (time.perf_counter() - start), 0))
                continue
            for output in engine.step():
                i = named[output.request_id]
                at, made = time.perf_counter() - came[i], output.outputs[0]
                answers[i].tokens += made.token_ids
                answers[i].times += [at] * len(made.token_ids)
                for step in made.logprobs or ():
                    answers[i].best.append({token: each.logprob for token, each in step.items()})
            steps += 1
            for name, which in named.items():
                if requests[which].abort == steps:
                    engine.abort_request([name])
        return answers

    def first_token(self, ids: list[int]) -> float:
        """Seconds to the first token of a prompt of which nothing is in the cache."""
        self.forget()
        return self.serve([Request(ids, 1)])[0].times[0]
