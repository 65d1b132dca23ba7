"""What every engine gives, whatever runs the model."""

import dataclasses
import typing


@dataclasses.dataclass
class Score:
    """How well one prefill predicted the judged tokens at a document's end."""

    at: list[int]  # which of them, ascending: all, or evenly spaced ones
    nll: list[float]  # of each
    kl: list[float] | None  # KL(full || run) in nats, where each was predicted
    same: list[float] | None  # 1 where the most likely token is full attention's, else 0
    density: float
    layers: list[float]
    seconds: float


@dataclasses.dataclass
class Answer:
    text: str
    tokens: list[int]
    density: float
    seconds: float  # of the prefill


class Texts:
    """What engines have in common: text to tokens and back, by the model's tokenizer."""

    tokenizer: typing.Any

    @property
    def room(self) -> int:
        """Tokens of prompts that are worth answering together; 0 for one prompt at a time."""
        return 0

    def answers(self, ids, attentions, max_new_tokens) -> dict:
        """Continues a prompt greedily: {attention's name: Answer, or Unsupported}."""
        raise NotImplementedError

    def answers_to(self, asked) -> list[dict]:
        """What answers() gives, for each (ids, attentions, max_new_tokens) of a list."""
        return [self.answers(*each) for each in asked]

    def encode(self, text) -> list[int]:
        return self.tokenizer(text, verbose=False).input_ids

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, prompt, begun="") -> list[int]:
        """A user's message as the model's chat template has it, up to where the answer begins, or goes on behind `begun`;
        without a template the message as it is."""
        if not self.tokenizer.chat_template:
            return self.encode(f"{prompt}\n{begun}" if begun else prompt)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text + begun, add_special_tokens=False, verbose=False).input_ids
