"""SGLang's scheduler and model runner on the CPU, in this process, on a tiny random model; requests that it serves in a
fixed order, by its torch_native attention and by the plug-in.

    engine.py MODEL PAGE_SIZE RESULTS

writes both's answers and what the plug-in did as JSON. A process can have one scheduler.
"""

import array
import json
import logging
import os
import pathlib
import sys
import typing

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    GLOO_SOCKET_IFNAME="lo",
    OMP_NUM_THREADS="1",  # the work of this model is less than what threads cost
    TORCHDYNAMO_DISABLE="1",  # and than what compiling costs
    TRITON_INTERPRET="1",  # SGLang's allocator of pages is a kernel
    SGLANG_USE_CPU_ENGINE="1",
)

sys.path.append(str(pathlib.Path(__file__).parents[1] / "support"))

import torch_flash
from tiny_models import prompt

sys.modules.update(torch_flash.sgl_kernel())

CHUNK = 256  # tokens of a step
MIN_TOKENS = 64


# By name: requests that come at once, as (prompt, tokens to make).
REQUESTS = {
    # Chunks of 256, of which the last is too short to be taken.
    "chunks": [(prompt(1, 800), 4)],
    # All but the end of the first prompt is in the radix cache.
    "prefix": [(prompt(1, 800)[:640] + prompt(7, 250), 4)],
    "whole": [(prompt(2, 200), 4)],
    # Short prefills beside long ones, and prefills beside decodes.
    "mixed": [(prompt(3, 90), 20), (prompt(4, 500), 6), (prompt(5, 20), 12), (prompt(6, 333), 6)],
    # More tokens than the cache holds: somebody is retracted, and computed again.
    "retracted": [(prompt(10 + i, 380), 120) for i in range(3)],
}
TOKENS = 1408  # of the KV cache
TAKING_TURNS = ("torch_native", "pbs")


class Engine:
    """One scheduler, stepped by hand, so that who stands beside whom in a batch is no chance."""

    def __init__(self, model: str, page_size: int) -> None:
        from sglang.srt.managers import scheduler
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, ServerArgs

        load_plugins()
        torch_flash.install()
        args = ServerArgs(
            model_path=model,
            device="cpu",
            dtype="float32",
            attention_backend="torch_native",
            prefill_attention_backend="pbs",
            decode_attention_backend="torch_native",
            skip_tokenizer_init=True,
            page_size=page_size,
            chunked_prefill_size=CHUNK,
            enable_mixed_chunk=True,
            max_total_tokens=TOKENS,
            mem_fraction_static=0.1,
            disable_cuda_graph=True,
            disable_overlap_schedule=True,
            context_length=1024,
            max_running_requests=8,
        )
        scheduler.publish(args, role="scheduler")
        self.scheduler = scheduler.Scheduler(args, PortArgs.init_new(args), 0, 0, 0, 0, 0, 0, None)
        self.runner = self.scheduler.tp_worker.model_runner
        self.backends = {"pbs": self.runner.attn_backend, "torch_native": self.runner.attn_backend.decode_backend}
        self.modes: set[str] = set()

    def serve(self, requests: list[tuple[list[int], int]]) -> list[list[int]]:
        """The answers to requests (prompt, tokens to make) that come at once."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        s = self.scheduler
        for i, (ids, make) in enumerate(requests):
            sampling = SamplingParams(temperature=0, max_new_tokens=make, ignore_eos=True)
            sampling.normalize(None)
            s.handle_generate_request(
                TokenizedGenerateReqInput(
                    rid=f"request-{i}",
                    input_text=None,
                    input_ids=array.array("q", ids),
                    input_embeds=None,
                    mm_inputs=None,
                    token_type_ids=None,
                    sampling_params=sampling,
                    return_logprob=False,
                    logprob_start_len=-1,
                    top_logprobs_num=0,
                    token_ids_logprob=None,
                    stream=False,
                )
            )
        waiting = list(s.waiting_queue)
        while True:
            plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
            s.running_batch, batch = plan.running_batch, plan.batch_to_run
            if batch:
                self.modes.add(batch.forward_mode.name)
                s.process_batch_result(batch, s.run_batch(batch))
            s.last_batch = batch
            if not batch:
                break
        assert all(request.finished() for request in waiting)
        self.retractions = sum(request.retraction_count for request in waiting)
        return [list(request.output_ids) for request in waiting]


class Watch:
    """Sees to it that a layer computes every token once, and notes which rows pbsattn computes."""

    def __init__(self) -> None:
        from pbsattn_sglang.rows import RowsBackend

        forward, row = RowsBackend.forward_extend, RowsBackend._row
        self.rows: list[tuple[int, int, int]] = []  # (layer, tokens, keys)
        self.mixed_calls = 0  # of a layer, that computed rows by both
        tokens = 0

        def watched_row(backend, taken, which, *rest):
            nonlocal tokens
            row(backend, taken, which, *rest)
            tokens += which.tokens
            self.rows.append((taken.index, which.tokens, which.kv_len))

        def watched_forward(backend, q, *rest, **named):
            nonlocal tokens
            tokens, torch_flash.calls.tokens = 0, 0
            result = forward(backend, q, *rest, **named)
            assert tokens + torch_flash.calls.tokens == q.shape[0], "a token was computed twice, or not at all"
            assert result.isfinite().all()
            self.mixed_calls += bool(tokens and torch_flash.calls.tokens)
            return result

        RowsBackend.forward_extend, RowsBackend._row = watched_forward, watched_row


def main(model: str, page_size: str, results: str) -> None:
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("sglang.pbsattn").addHandler(handler)
    logging.getLogger("sglang.pbsattn").setLevel(logging.INFO)
    os.environ.setdefault("PBSATTN_MIN_TOKENS", str(MIN_TOKENS))
    engine = Engine(model, int(page_size))
    watch = Watch()
    answers: dict[str, typing.Any] = {}
    rows, retractions = {}, {}
    for name in TAKING_TURNS:
        engine.runner.attn_backend = engine.backends[name]
        answers[name] = {}
        for requests, given in REQUESTS.items():
            watch.rows = []
            answers[name][requests] = engine.serve(given)
            rows[requests], retractions[requests] = watch.rows, engine.retractions
        assert engine.scheduler.flush_cache()
    told = {"answers": answers, "rows": rows, "retractions": retractions, "mixed_calls": watch.mixed_calls}
    with open(results, "w", encoding="utf-8") as file:
        json.dump({**told, "modes": sorted(engine.modes), "log": log}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # SGLang's threads go on
