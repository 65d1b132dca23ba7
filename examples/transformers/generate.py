#!/usr/bin/env python3
"""A model of transformers whose prompt goes through pbsattn: generate.py MODEL TEXT [--method pbs]

MODEL is a folder that save_pretrained wrote; TEXT a long text.
"""

import argparse

import torch
import transformers

import pbsattn.transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--min-tokens", type=int, default=None, help="shorter calls go to PyTorch's attention")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, at most")
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).to(device).eval()
    with open(given.text, encoding="utf-8") as text:
        inputs = tokenizer(text.read(), return_tensors="pt", truncation=True, max_length=given.tokens).to(device)

    with pbsattn.transformers.enable(model, method=given.method, min_tokens=given.min_tokens, stats=True):
        made = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        for layer in pbsattn.transformers.stats(model):
            print(f"layer {layer.layer}: density {layer.density}")


if __name__ == "__main__":
    main()
