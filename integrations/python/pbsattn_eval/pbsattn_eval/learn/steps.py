"""The steps of a fit, layer by layer as a model computes them: results of each text are a file of the run's folder."""

import sys

import torch

from . import file, order


class Fitted:
    """A learned order of a model, fitted on texts and tried on others.

    weights: [layers, KV heads, 3 D / 2] of every head; paying: the same with zeros for heads that it hardly pays for.
    """

    def __init__(self, engine, texts, out, thresholds):
        """texts: {name: (tokens to fit on, tokens to find the heads on)}, lists of tokens."""
        self._engine, self._out, self._thresholds = engine, out, thresholds
        self.pairs = engine.rope_pairs
        fitted = [self._step(f"fit-{name}", fit, self._equations) for name, (fit, _) in texts.items()]
        self.sizes = file.Sizes(engine.layers, *fitted[0]["heads"][0].tolist())
        self.weights = order.solve(sum(each["a"] for each in fitted), sum(each["b"] for each in fitted))
        self._on_device = self.weights.to(engine.device)
        gains = [self._step(f"heads-{name}", heads, self._gains)["gain"] for name, (_, heads) in texts.items()]
        self.paying = self.weights.where(order.paying(torch.cat(gains, -1))[..., None], 0)

    def _step(self, name, ids, compute):
        """Tensors of compute(layer, q, k, scale) stacked by layer, from their file or else computed and written there."""
        import tqdm

        path = self._out / f"{name}.safetensors"
        if not path.exists():
            made = {}
            with tqdm.tqdm(total=self._engine.layers, desc=name, unit="layer", file=sys.stderr, dynamic_ncols=True) as bar:

                def visit(layer, q, k, _, scale):
                    for key, tensor in compute(layer, q[0], k[0], scale).items():
                        made.setdefault(key, []).append(tensor)
                    bar.update()

                self._engine.each_layer(ids, visit)
            seen = len(next(iter(made.values()), []))
            if seen != self._engine.layers:
                raise ValueError(
                    f"model: {seen} of its {self._engine.layers} layers have attention; an order is learned for models that "
                    "have it in every layer"
                )
            if any(tensor.shape != of_layers[0].shape for of_layers in made.values() for tensor in of_layers):
                raise ValueError(
                    "model: its layers differ in heads or their width; an order is learned for layers that are alike"
                )
            file.write_tensors(path, {key: torch.stack(of_layers).cpu() for key, of_layers in made.items()})
        return file.read_tensors(path)

    def _equations(self, _, q, k, scale):
        a, b = order.equations(q, k, scale, self.pairs)
        return {"a": a, "b": b, "heads": torch.tensor([q.shape[0], k.shape[0], k.shape[2]])}

    def _gains(self, layer, q, k, scale):
        """By how much a row costs less under the learned order, on average of a KV head's query heads."""
        scores = order.scores(k, self._on_device[layer], self.pairs)
        orders = [order.upper(torch.zeros_like(scores)), order.upper(scores)]
        none, learned = order.costs(q, k, scale, orders, self._thresholds)
        return {"gain": (none - learned).unflatten(0, (k.shape[0], -1)).mean(1)}
