"""Which key somebody means who types a wrong one: its last part, another project's name, a slip."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# as other projects say it -> the last part of ours
SYNONYMS = {
    "learning_rate": "lr", "max_lr": "lr", "peak_lr": "lr", "adam_beta1": "beta1",
    "adam_beta2": "beta2", "adam_epsilon": "eps", "wd": "weight_decay",
    "max_grad_norm": "grad_clip", "clip_grad": "grad_clip", "clip_grad_norm": "grad_clip",
    "gradient_clipping": "grad_clip", "warmup": "warmup_steps", "num_warmup_steps": "warmup_steps",
    "lr_scheduler_type": "schedule", "lr_schedule": "schedule", "scheduler": "schedule",
    "max_steps": "steps", "num_steps": "steps", "total_steps": "steps", "train_steps": "steps",
    "max_iters": "steps", "iters": "steps", "epochs": "steps", "num_epochs": "steps",
    "num_train_epochs": "steps",
    "global_batch_size": "batch_size", "train_batch_size": "batch_size", "bs": "batch_size",
    "per_device_train_batch_size": "micro_batch_size", "device_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size", "grad_accum": "micro_batch_size",
    "bf16": "precision", "fp16": "precision", "fp32": "precision", "dtype": "precision",
    "torch_dtype": "precision", "mixed_precision": "precision",
    "gradient_checkpointing": "activation_checkpointing", "logging_steps": "log_every",
    "eval_steps": "evaluate_every", "eval_every": "evaluate_every", "save_steps": "save_every",
    "save_total_limit": "keep_last", "resume_from_checkpoint": "resume",
    "seq_length": "seq_len", "sequence_length": "seq_len", "context_length": "seq_len",
    "max_seq_len": "seq_len", "max_seq_length": "seq_len", "block_size": "seq_len",
    "max_position_embeddings": "max_position", "dataset": "name", "data_path": "sources",
    "num_hidden_layers": "num_layers", "n_layer": "num_layers", "layers": "num_layers",
    "num_attention_heads": "num_heads", "n_head": "num_heads", "heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "n_kv_heads": "num_kv_heads",
    "hidden_dim": "hidden_size", "d_model": "hidden_size", "n_embd": "hidden_size",
    "num_local_experts": "num_experts", "n_experts": "num_experts",
    "num_experts_per_tok": "top_k", "experts_per_token": "top_k",
    "router_aux_loss_coef": "balance_coef", "aux_loss_coef": "balance_coef",
    "nproc_per_node": "processes_per_node", "gpus": "processes_per_node",
    "nnodes": "num_nodes", "nodes": "num_nodes", "zero": "zero_stage",
    "ep_size": "expert_parallel_size", "ep": "expert_parallel_size",
    "output_dir": "run_dir", "out_dir": "run_dir", "save_dir": "run_dir", "report_to": "wandb",
    "max_tokens": "max_new_tokens", "temp": "temperature", "n": "num_samples",
    "checkpoint": "run", "model_path": "run", "ckpt": "run", "input_file": "prompts_file",
}  # fmt: skip


def right_key(wrong: str, known: Iterable[str], *, words: Iterable[str] = ()) -> str | None:
    """The known key that wrong stands for, or None; words are right ones without parts."""
    keys = list(known)
    last = wrong.rpartition(".")[2].replace("-", "_").lower()
    found = named(wrong, keys)
    if found:
        return found
    close = difflib.get_close_matches(wrong, [*keys, *words], n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(last, [*by_last], n=1, cutoff=0.8)
    return by_last[close[0]] if close else None


def named(wrong: str, known: Iterable[str]) -> str | None:
    """The known key with the same last part, or with what other projects' word for it is."""
    parent, _, last = wrong.replace("-", "_").lower().rpartition(".")
    for name in dict.fromkeys((last, SYNONYMS.get(last, last))):
        ends = [key for key in known if key.rpartition(".")[2] == name]
        if ends:
            # in the group that was said, else the one that is typed most: the shortest
            return min(ends, key=lambda key: (key.rpartition(".")[0] != parent, _rank(key)))
    return None


def _rank(key: str) -> tuple[int, int]:
    common = ("optim", "train", "data", "model", "router", "sampling", "paths")
    group = key.partition(".")[0]
    return (common.index(group) if group in common else len(common), len(key))


def did_you_mean(key: str | None) -> str:
    """Return " Did you mean 'x'?", or an empty string without a key."""
    return f" Did you mean {key!r}?" if key else ""
