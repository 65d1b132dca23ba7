"""vLLM's engine on the CPU, in this process, on tiny random models; and requests that it serves in a fixed order."""

import dataclasses
import gc
import os
import typing

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_HOST_IP="127.0.0.1",
    GLOO_SOCKET_IFNAME="lo",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",  # the work of these models is less than what threads cost
    TORCHDYNAMO_DISABLE="1",  # and than what compiling costs
)

CHUNK = 256  # tokens of a step
MIN_TOKENS = 64
BLOCKS = {16: 76, 64: 20, 128: 10}  # of the KV cache, by their tokens: fewer than some of the requests together need


@dataclasses.dataclass
class Answer:
    """Of a request: tokens, and by token its log-probability and the next best one's."""

    tokens: list[int]
    best: list[float]
    second: list[float]


class Engine:
    """One engine. Requests are stepped by hand, so that who stands beside whom in a batch is no chance."""

    def __init__(self, model: str, block_size: int, ranks: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=8,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            block_size=block_size,
            tensor_parallel_size=ranks,
            worker_extension_cls="rank.Extension" if ranks > 1 else "",
            num_gpu_blocks_override=BLOCKS[block_size],
            disable_log_stats=True,
        )
        self.count = 0

    @property
    def free_blocks(self) -> int:
        """Blocks of the KV cache that no request holds."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def serve(self, requests: list[tuple[list[int], int]], abort: dict[int, int] | None = None) -> list[Answer | None]:
        """The answers to requests (prompt, tokens to make) that come at once; `abort`: {request: after so many steps}."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        engine, names, done, steps = self.llm.llm_engine, [], {}, 0
        for ids, make in requests:
            names.append(f"request-{self.count}")
            self.count += 1
            parameters = SamplingParams(temperature=0, max_tokens=make, detokenize=False, ignore_eos=True, logprobs=2)
            engine.add_request(names[-1], TokensPrompt(prompt_token_ids=ids), parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output.outputs[0]
            steps += 1
            for index, after in (abort or {}).items():
                if steps == after:
                    engine.abort_request([names[index]])
        return [answer_of(done[name]) if name in done and done[name].finish_reason != "abort" else None for name in names]

    def close(self) -> None:
        """Frees it, so that the process can make another."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answer_of(output: typing.Any) -> Answer:
    """vLLM's output of a request."""
    ranked = [sorted((each.logprob for each in step.values()), reverse=True) for step in output.logprobs]
    return Answer(list(output.token_ids), [each[0] for each in ranked], [each[1] for each in ranked])
