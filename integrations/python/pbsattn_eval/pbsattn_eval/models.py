"""The models and texts that a benchmark runs on."""

import pathlib
import sysconfig

import torch
import transformers

# Stacks of the named shape with random weights: right for time and memory, meaningless as language.
SHAPES = {
    "llama-3.1-8b": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        tie_word_embeddings=False,
    )
}


def load(path, device, dtype):
    """Model and tokenizer from a folder, or from a GGUF file, which is dequantised."""
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"model {path}: no such file or folder; name a GGUF file or a folder that save_pretrained wrote")
    where, extra = (path.parent, dict(gguf_file=path.name)) if path.is_file() else (path, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **extra)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra)
    return model.to(device).eval(), tokenizer


def make(shape, device, dtype):
    """A model of a named shape with random weights."""
    if shape not in SHAPES:
        raise ValueError(f'shape "{shape}": no such shape; there are {", ".join(SHAPES)}')
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(SHAPES[shape]())
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def native_length(model):
    return model.config.max_position_embeddings


def set_yarn(model, factor):
    """Stretches rotary positions by YaRN for texts longer than the model was trained on; 1 is as trained."""
    config = model.config
    trained = vars(model).setdefault("_trained_rope", dict(config.rope_parameters))
    wanted = (
        trained
        if factor == 1
        else dict(
            rope_theta=trained["rope_theta"],
            rope_type="yarn",
            factor=float(factor),
            original_max_position_embeddings=config.max_position_embeddings,
        )
    )
    if config.rope_parameters != wanted:
        config.rope_parameters = wanted
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=config).to(rotary.inv_freq.device)


def python_source():
    """A long text that is wherever Python is: its standard library's source."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"), key=lambda file: (-file.stat().st_size, file.name))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def tokens(tokenizer, text, count, device):
    """The first `count` tokens of a text, [1, count]."""
    most = 8 * count  # characters: more than any text needs, and tokenizing a long one takes its time
    ids = tokenizer(text[:most], return_tensors="pt", verbose=False).input_ids[:, :count]
    if ids.shape[1] < count:
        raise ValueError(f"text: {ids.shape[1]} tokens, {count} needed; pass a longer --text or smaller --lengths")
    return ids.to(device)


def beyond_causal(tokens, kwargs):
    """Returns what a call of attention has beyond a causal softmax over so many tokens, in words; None for nothing."""
    window = kwargs.get("sliding_window")
    if window is not None and window < tokens:
        return f"a sliding window of {window} tokens"
    if kwargs.get("softcap") is not None:
        return f"soft-capped logits (softcap {kwargs['softcap']})"
    return "sinks (s_aux)" if kwargs.get("s_aux") is not None else None


@torch.no_grad()
def each_layer(model, ids, visit, causal=False):
    """Runs a prompt, [1, tokens], through a model, and calls visit(layer, q, k, v, scale) with the queries, keys and values
    [1, heads, tokens, head_dim] of each layer's attention when it comes to it: no two layers' are held at a time. causal:
    raises ValueError where a layer isn't a causal softmax alone."""
    sdpa = transformers.AttentionInterface._global_mapping["sdpa"]

    def show(module, query, key, value, *args, scaling=None, **kwargs):
        if causal and (beyond := beyond_causal(query.shape[2], kwargs)):
            raise ValueError(
                f"model: layer {module.layer_idx} has {beyond}, which is left out of account here; take a model without"
            )
        visit(module.layer_idx, query, key, value, scaling or query.shape[-1] ** -0.5)
        return sdpa(module, query, key, value, *args, scaling=scaling, **kwargs)

    transformers.AttentionInterface.register("sdpa", show)
    try:
        model.set_attn_implementation("sdpa")
        model.model(ids, use_cache=False)
    finally:
        transformers.AttentionInterface.register("sdpa", sdpa)


def capture(model, ids, layers):
    """Queries, keys, values [1, heads, tokens, head_dim] and scale of some layers' attention to a prompt, [1, tokens]:
    {layer: (q, k, v, scale)}."""
    captured = {}

    def keep(layer, *its):
        if layer in layers:
            captured[layer] = its

    each_layer(model, ids, keep)
    return captured
