"""What the Python tests share. Every test of an op runs on the CPU, and where there is a GPU that pbsattn takes, on it."""

import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import pbsattn

TEXT = "the quick brown fox jumps over the lazy dog and runs away from all the other animals in the wood " * 100

# The sweep of all classes of transformers, whose tiny models other tests take too.
SWEEP = pathlib.Path(__file__).parents[1] / "models"
sys.path.append(str(SWEEP))

# What every record of a measurement says.
RECORD_KEYS = set("suite case params metric value unit peer peer_value ratio runs spread device commit date".split())


# Whether PBSATTN_CPU_PATH forces products in bf16 on whoever asks for f32.
FORCED_BF16 = "bf16" in os.environ.get("PBSATTN_CPU_PATH", "")


def f32_tolerance(tolerance, of_bf16):
    """A tolerance for products in f32 on the CPU, or what those in bf16 need where they are forced."""
    return of_bf16 if FORCED_BF16 else tolerance


def has_gpu():
    return pbsattn._core.has_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=["cpu", "cuda"] if has_gpu() else ["cpu"])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def save_llama(path, words, **sizes):
    """Saves a small random model, always the same, for a tokenizer of so many words."""
    import transformers

    sizes = {"intermediate_size": sizes["hidden_size"], "max_position_embeddings": 1000, **sizes}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=words, **sizes)).save_pretrained(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model and a tokenizer, as save_pretrained writes them, and a text."""
    import tokenizers
    import transformers

    path = tmp_path_factory.mktemp("model")
    words = {word: i for i, word in enumerate([*sorted(set(TEXT.split())), "<unk>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    save_llama(path, len(words), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


def in_threads(work, count):
    """Runs work(0) to work(count - 1) at once, each in a thread."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def qkv(device, q_len=700, kv_len=None, batch=1, q_heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16):
    """Random q, k and v, [B, H, S, D]."""
    kv_len = kv_len or q_len

    def make(heads, tokens):
        return torch.randn(batch, heads, tokens, head_dim).to(device=device, dtype=dtype)

    return make(q_heads, q_len), make(kv_heads, kv_len), make(kv_heads, kv_len)


def dense(q, k, v, scale=None, sinks=None, softcap=None, window=None):
    """The definition, in float64: output and log-sum-exp of causal attention whose queries are the last ones."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    offset, all_pairs = k.shape[2] - q.shape[2], torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    scores = scores.masked_fill(all_pairs.triu(offset + 1), -torch.inf)
    if window is not None:
        scores = scores.masked_fill(all_pairs.tril(offset - window), -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
    scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v, torch.logsumexp(scores, -1)


def error(got, truth):
    """Relative error in the Frobenius norm."""
    got = got.double().cpu()
    return float((got - truth).norm() / truth.norm())


def sdpa_error(q, k, v, truth):
    """The error of PyTorch's own attention at the inputs' precision."""
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return error(F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True), truth)


def python(*arguments, without=None, folder=None, **options):
    """Runs Python in a process of its own, where the module `without` can't be imported."""
    environment = dict(os.environ)
    if without:
        (folder / "sitecustomize.py").write_text(f"import sys; sys.modules[{without!r}] = None\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, **options}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], text=True, env={**environment, **options.pop("env", {})}, **options
    )
