"""Small random models and prompts, always the same, for the tests of servers' plug-ins."""

import typing

import torch


def save_model(folder: typing.Any, **sizes: typing.Any) -> str:
    """Saves a model whose answers depend on what its attention sees; with `sliding_window` a Mistral, else a Llama."""
    import transformers

    kind, config = (
        (transformers.MistralForCausalLM, transformers.MistralConfig)
        if sizes.get("sliding_window")
        else (transformers.LlamaForCausalLM, transformers.LlamaConfig)
    )
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            initializer_range=0.1,
            **sizes,
        )
    )
    model.to(torch.float32).save_pretrained(folder)
    return str(folder)


def prompt(seed: int, tokens: int) -> list[int]:
    """Draws the ids of a prompt."""
    return torch.randint(3, 512, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
