"""Write texts for many prompts, several for each if wanted, a batch at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from moe.generate import check_prompt, generate_batch
from moe.inference_config import Sampling
from moe.model.transformer import Transformer


@dataclass(frozen=True)
class WrittenText:
    """New token ids of one prompt, without the stop token that ended them."""

    prompt: int  # its number
    sample: int  # 0, 1, ... of the same prompt
    ids: list[int]
    is_stopped: bool  # else the limit of new tokens ended it


def write_texts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    names: Sequence[str],
    stop_ids: Collection[int],
    num_samples: int,
    batch_size: int,
) -> Iterator[list[WrittenText]]:
    """Yield the texts of each batch when its last one has ended, all in the order of the prompts.

    A text depends on its prompt and its number, not on batch_size. Raises UserError naming the
    first prompt that the model cannot take, before any computation.
    """
    for prompt, name in zip(prompts, names, strict=True):
        check_prompt(prompt, sampling, model.config, name=name)
    places = [(number, sample) for number in range(len(prompts)) for sample in range(num_samples)]
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        texts: list[list[int]] = [[] for _ in batch]
        steps = generate_batch(
            model, [prompts[number] for number, _ in batch], sampling, stop_ids=stop_ids,
            rows=range(start, start + len(batch)), names=[names[number] for number, _ in batch],
        )  # fmt: skip
        for new in steps:
            for row, token in new.items():
                texts[row].append(token)
        yield [
            WrittenText(number, sample, ids, is_stopped=len(ids) < sampling.max_new_tokens)
            for (number, sample), ids in zip(batch, texts, strict=True)
        ]
