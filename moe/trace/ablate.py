"""What each token costs when one expert of one layer answers nothing, by replaying a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe.data.packing import IGNORED
from moe.errors import ConfigError
from moe.model.transformer import Transformer
from moe.sparse.forced import Forced
from moe.trace.read import Trace
from moe.trace.replay import ReplayBatch, replay_batches, without_expert
from moe.train.cross_entropy import cross_entropy


@dataclass(frozen=True)
class AblationLosses:
    """Nats of every predicted token, as numpy arrays: T tokens that have one after them."""

    loss_T: np.ndarray  # float32, of the model as it is
    ablated_AT: np.ndarray  # float32, a row for each ablated (layer, expert)
    document_T: np.ndarray  # int64, as in the trace
    domain_T: np.ndarray  # int16


@torch.no_grad()
def ablation_losses(
    model: Transformer,
    trace: Trace,
    *,
    ablated: Sequence[tuple[int, int]],
    precision: torch.dtype = torch.float32,
) -> AblationLosses:
    """Losses on the trace's tokens, without and with each (layer, expert) of `ablated` taken away.

    An ablated layer keeps the recorded choices, with weight 0 for the expert; the layers above
    see what is then different and choose for themselves. model: the traced one, in evaluation
    mode. Costs a forward pass for each of `ablated` and one more. Raises ConfigError for a layer
    or an expert that the model does not have.
    """
    for layer, expert in ablated:
        if not (0 <= layer < trace.info.num_layers and 0 <= expert < trace.info.num_experts):
            raise ConfigError(
                f"ablated: got layer {layer}, expert {expert}; allowed: layers 0 to "
                f"{trace.info.num_layers - 1}, experts 0 to {trace.info.num_experts - 1}."
            )
    whole, changed, documents, domains = [], [], [], []
    for batch in replay_batches(trace, model.config):
        batch = batch.to(model.embed.weight.device)
        is_predicted = batch.valid_BS[:, 1:].flatten()
        whole.append(_losses(model, batch, None, precision)[is_predicted])
        of_batch = []
        for layer, expert in ablated:
            forced: list[Forced | None] = [None] * len(batch.forced)
            forced[layer] = without_expert(batch.forced[layer], expert)
            of_batch.append(_losses(model, batch, forced, precision)[is_predicted])
        changed.append(
            torch.stack(of_batch) if of_batch else whole[-1].new_empty(0, len(whole[-1]))
        )
        documents.append(batch.document_BS[:, 1:].flatten()[is_predicted])
        domains.append(batch.domain_BS[:, 1:].flatten()[is_predicted])
    return AblationLosses(
        loss_T=torch.cat(whole).cpu().numpy(),
        ablated_AT=torch.cat(changed, dim=1).cpu().numpy(),
        document_T=torch.cat(documents).cpu().numpy(),
        domain_T=torch.cat(domains).cpu().numpy().astype(np.int16),
    )


def _losses(
    model: Transformer,
    batch: ReplayBatch,
    forced: Sequence[Forced | None] | None,
    precision: torch.dtype,
) -> Tensor:
    """Nats (B * (S - 1),) of each place's next token; 0 where that is padding."""
    device = batch.tokens_BS.device
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        logits = model(batch.tokens_BS, position_BS=batch.position_BS, forced=forced).logits[:, :-1]
    labels = batch.tokens_BS[:, 1:].masked_fill(~batch.valid_BS[:, 1:], IGNORED)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignored=IGNORED).float()
