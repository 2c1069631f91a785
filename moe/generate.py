"""Write text with a model: a key-value cache, temperature, top-k, top-p, stop tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe.errors import UserError
from moe.inference_config import Sampling
from moe.model.attention import KeyValueCache
from moe.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int]
) -> Iterator[int]:
    """Yield new token ids one by one; a stop token ends the text and is not yielded.

    Raises UserError where prompt and new tokens are longer than the model's usable length, or a
    prompt id is outside the vocabulary.
    """
    length = len(prompt) + sampling.max_new_tokens
    usable, vocab_size = model.config.usable_length, model.config.vocab_size
    if not prompt:
        raise UserError("prompt: it has no tokens; give some text.")
    if length > usable:
        raise UserError(
            f"prompt of {len(prompt)} tokens and sampling.max_new_tokens={sampling.max_new_tokens} "
            f"make {length}; the model takes {usable}. Shorten one of them."
        )
    if max(prompt) >= vocab_size:
        raise UserError(
            f"prompt: token id {max(prompt)} is outside the model's vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model."
        )
    device = model.embed.weight.device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    caches = KeyValueCache.empty(
        model.config, batch=1, length=length, device=device, dtype=model.embed.weight.dtype
    )
    text, start = list(prompt), 0
    for _ in range(sampling.max_new_tokens):
        if start == model.config.rope.original_max_position:
            start = 0  # the long rotary factors begin here: everything cached is of the short ones
        tokens = torch.tensor([text[start:]], device=device)
        logits = model(tokens, caches=caches, start=start).logits[0, -1]
        start = len(text)
        token = int(next_token(logits.float(), sampling, generator))  # syncs: the caller prints it
        if token in stop_ids:
            return
        yield token
        text.append(token)


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one id: temperature, then top-k, then top-p, as transformers orders its processors."""
    if sampling.temperature == 0:
        return logits_V.argmax()
    logits_V = logits_V / sampling.temperature
    if sampling.top_k > 0:
        least = logits_V.topk(min(sampling.top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    if sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True)
        probability_V = sorted_V.softmax(dim=-1)
        # a token goes when those before it already hold top_p; the first always stays
        outside_V = probability_V.cumsum(dim=-1) - probability_V >= sampling.top_p
        logits_V = logits_V.masked_fill(outside_V.scatter(0, order_V, outside_V), float("-inf"))
    return torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generator)[0]
