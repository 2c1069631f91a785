"""Write text with a model: one prompt or a batch, token by token, until stop tokens or the limit.

A text depends on its prompt, the settings and its own random numbers, never on the batch it was
written in; but a batch adds in another order, so that the last bits of the logits differ, and two
tokens that are as likely as each other to these bits (often in bfloat16) can change places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence

import torch
from torch import Tensor

from moe.errors import UserError
from moe.inference_config import Sampling
from moe.model.transformer import Transformer
from moe.model_config import ModelConfig
from moe.sampling import draw, processed_logits, uniform_numbers
from moe.text_batch import TextBatch

# the same tokens on every process, from what each has drawn
Agree = Callable[[Tensor], Tensor]
# Finished rows are taken out once they are this share of the batch. That copies the others' cache
# once, 0.3 to 0.4 of a step's time. 16 texts of 384 tokens that end one by one, dense model, one
# CPU core: 3.6 s where all stay, 2.8 s with one half, 2.5 s with one quarter, 2.5 s at once
_FINISHED_SHARE = 0.25


def generate(
    model: Transformer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    agree: Agree | None = None,
) -> Iterator[int]:
    """Yield new token ids one by one; a stop token ends the text and is not yielded.

    The text is that of row 0 of generate_batch, which raises the same errors.
    """
    steps = generate_batch(model, [prompt], sampling, stop_ids=stop_ids, agree=agree)
    return (new[0] for new in steps)


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    agree: Agree | None = None,
) -> Generator[dict[int, int]]:
    """Yield, step by step, prompt number -> new token, of each prompt whose text goes on.

    A stop token ends its text and is not yielded; the end of all texts ends the generation. rows
    are the numbers that, with sampling.seed, choose the random numbers of each text, 0, 1, ... if
    absent: number them through to write the same texts in batches of another size. names are what
    errors call the prompts. agree is applied to each step's tokens: where a model is spread over
    processes, all of them write the same text together. One host synchronisation a step.

    Raises UserError, before any computation, where there is no prompt, a prompt is empty or has an
    id outside the vocabulary, or prompt and new tokens are longer than the model's usable length;
    and during it where the model's logits are not numbers.
    """
    if not prompts:
        raise UserError("prompts: there are none; give at least one.")
    num = len(prompts)
    if names is None:
        names = [f"prompt {n} of {num}" for n in range(1, num + 1)] if num > 1 else ["prompt"]
    for prompt, name in zip(prompts, names, strict=True):
        check_prompt(prompt, sampling, model.config, name=name)
    rows = range(num) if rows is None else rows
    return _steps(model, prompts, sampling, frozenset(stop_ids), rows, names, agree)


def check_prompt(
    prompt: Sequence[int], sampling: Sampling, config: ModelConfig, *, name: str
) -> None:
    """Raise UserError where the model cannot take the prompt and the new tokens."""
    length, usable = len(prompt) + sampling.max_new_tokens, config.usable_length
    if not prompt:
        raise UserError(f"{name}: it has no tokens; give some text.")
    if length > usable:
        raise UserError(
            f"{name} of {len(prompt)} tokens and sampling.max_new_tokens={sampling.max_new_tokens} "
            f"make {length}; the model takes {usable}. Shorten one of them."
        )
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"{name}: token id {token} is outside the model's vocabulary of "
                f"{config.vocab_size}; allowed: 0 to {config.vocab_size - 1}. The tokenizer "
                "belongs to another model."
            )


@torch.inference_mode()
def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    rows: Sequence[int],
    names: Sequence[str],
    agree: Agree | None,
) -> Generator[dict[int, int]]:
    batch = TextBatch(model, prompts, room=sampling.max_new_tokens - 1)
    device = model.embed.weight.device
    uniform_BN = uniform_numbers(
        sampling.seed, [rows[number] for number in batch.order], num=sampling.max_new_tokens,
        device=device,
    )  # fmt: skip
    seen_BV = _seen_tokens(prompts, batch.order, sampling, model.config.vocab_size, device)
    finished: set[int] = set()  # prompts whose rows may still be in the batch
    logits_BV = batch.read_prompts()
    for step in range(sampling.max_new_tokens):
        logits_BV = processed_logits(logits_BV, sampling, seen_BV=seen_BV)
        token_B = (
            logits_BV.argmax(dim=-1)
            if sampling.temperature == 0
            else draw(logits_BV, uniform_BN[:, step])
        )
        if agree is not None:
            token_B = agree(token_B)
        tokens = _on_host(token_B, logits_BV, names=[names[number] for number in batch.order])
        new = {
            number: token
            for number, token in zip(batch.order, tokens, strict=True)
            if number not in finished and token not in stop_ids
        }
        if new:
            yield dict(sorted(new.items()))
        if not new or step + 1 == sampling.max_new_tokens:
            return
        finished.update(number for number in batch.order if number not in new)
        if _pays_to_take_out(batch, num_finished=len(batch) - len(new)):
            kept = [row for row, number in enumerate(batch.order) if number in new]
            batch.keep(kept)
            row_K = torch.tensor(kept, device=device)
            token_B, uniform_BN = token_B[row_K], uniform_BN[row_K]
            seen_BV = None if seen_BV is None else seen_BV[row_K]
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)
        logits_BV = batch.extend(token_B)


def _pays_to_take_out(batch: TextBatch, *, num_finished: int) -> bool:
    """Before a pass over a whole text any finished row, else a share of them."""
    if batch.is_about_to_cross:
        return num_finished > 0
    return num_finished >= _FINISHED_SHARE * len(batch)


def _on_host(token_B: Tensor, logits_BV: Tensor, *, names: Sequence[str]) -> list[int]:
    """The tokens drawn; UserError where they were drawn from what are no numbers."""
    # the largest logit is NaN where any is, and -inf where all are
    is_sound_B = logits_BV.amax(dim=-1).isfinite()
    pairs = torch.stack([token_B, is_sound_B.long()], dim=1).tolist()  # syncs: once a step
    for name, (_, is_sound) in zip(names, pairs, strict=True):
        if not is_sound:
            raise UserError(
                f"{name}: the model's logits are not finite numbers, so no token can be drawn. Its "
                "parameters are damaged or outside the range of their type: look at how it was "
                "trained, or use an earlier checkpoint."
            )
    return [token for token, _ in pairs]


def _seen_tokens(
    prompts: Sequence[Sequence[int]],
    order: Sequence[int],
    sampling: Sampling,
    vocab_size: int,
    device: torch.device,
) -> Tensor | None:
    """bool (B, V): the tokens of each row's prompt; None where nobody asks."""
    if sampling.repetition_penalty == 1.0:
        return None
    seen_BV = torch.zeros(len(order), vocab_size, dtype=torch.bool)
    for row, number in enumerate(order):
        seen_BV[row, torch.tensor(prompts[number])] = True
    return seen_BV.to(device)
