"""How well a model predicts held-out text: loss, perplexity and bits per byte, by domain.

Bits per byte compares across tokenizers: nats / ln 2 / bytes of exactly the documents evaluated.
Beside it stands the unigram entropy of the same tokens, what a model that knows only how often
each token occurs in them would reach.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.data.loader import evaluated_bytes, evaluation_batches
from moe.data.packing import IGNORED
from moe.data.shards import TokenSplit
from moe.model.transformer import Transformer
from moe.parallel.processes import Processes
from moe.progress_call import ProgressCall, no_progress
from moe.train.cross_entropy import cross_entropy


@torch.no_grad()
def evaluate(
    model: Transformer,
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    precision: torch.dtype,
    processes: Processes,
    progress: ProgressCall = no_progress,
) -> dict[str, float]:
    """Return a flat record under validation/: loss (nats a token), perplexity, bits_per_byte,
    unigram_entropy (nats a token), unigram_bits_per_byte, tokens, and the first two per domain.

    progress is told of the tokens of each batch.
    """
    was_training = model.training
    model.eval()
    num_domains, vocab_size = len(split.domains), model.config.vocab_size
    device = processes.device
    nats = torch.zeros(num_domains, dtype=torch.float64, device=device)
    tokens = torch.zeros(num_domains, dtype=torch.float64, device=device)
    counts = torch.zeros(vocab_size, dtype=torch.float64, device=device)
    for batch in evaluation_batches(
        split,
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=max_tokens,
        rank=processes.rank,
        world_size=processes.world_size,
    ):
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            logits = model(
                batch.tokens, position_BS=batch.position, document_BS=batch.document
            ).logits
        losses = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignored=IGNORED)
        real = batch.labels.flatten() != IGNORED
        domain = batch.domain.flatten().clamp(min=0)
        nats.index_add_(0, domain, losses.double())  # an ignored label's loss is 0
        tokens.index_add_(0, domain, real.double())
        counts.index_add_(0, batch.labels.flatten().clamp(min=0), real.double())
        progress(batch.tokens.numel())
    model.train(was_training)
    totals = processes.sum(torch.cat([nats, tokens, counts])).cpu()
    sizes = evaluated_bytes(split, max_tokens=max_tokens)
    return _record(totals, split.domains, sizes, num_domains)


def _record(
    totals: Tensor, domains: tuple[str, ...], sizes: dict[str, int], num_domains: int
) -> dict[str, float]:
    nats, tokens = totals[:num_domains], totals[num_domains : 2 * num_domains]
    counts = totals[2 * num_domains :]
    num_tokens, num_bytes = float(tokens.sum()), sum(sizes.values())
    share = counts[counts > 0] / num_tokens
    unigram = float(-(share * share.log()).sum())
    loss = float(nats.sum()) / num_tokens
    record = {
        "validation/loss": loss,
        "validation/perplexity": math.exp(min(loss, 700.0)),
        "validation/bits_per_byte": _bits(float(nats.sum()), num_bytes),
        "validation/unigram_entropy": unigram,
        "validation/unigram_bits_per_byte": _bits(unigram * num_tokens, num_bytes),
        "validation/tokens": num_tokens,
    }
    for index, domain in enumerate(domains):
        if tokens[index] > 0:
            record[f"validation/loss/{domain}"] = float(nats[index] / tokens[index])
            record[f"validation/bits_per_byte/{domain}"] = _bits(float(nats[index]), sizes[domain])
    return record


def _bits(nats: float, num_bytes: int) -> float:
    return nats / math.log(2) / max(1, num_bytes)
