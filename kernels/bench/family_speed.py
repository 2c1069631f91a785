"""Prefill and decode against transformers on the same weights, as ratios within one run.

usage: python kernels/bench/family_speed.py [--repeats 15] [--length 1024] [--json FILE]

A small Phimoe and a small Phi3 are made with transformers, saved, converted by launch/convert.py,
and both programs run the same tokens. A ratio above 1 means that we are faster. transformers runs
with SDPA attention and, for the experts, with the fastest of its own implementations, which is
measured first. The two sides alternate, so that a busy machine slows both; the ratio is the median
over pairs, its spread the quartiles. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import transformers  # noqa: E402 the path comes first

from moe.generate import generate  # noqa: E402
from moe.inference_config import Sampling  # noqa: E402
from moe.load_run import load_run  # noqa: E402
from moe.model.attention import KeyValueCache  # noqa: E402
from moe.model.transformer import Transformer  # noqa: E402

SHAPE = {
    "vocab_size": 4096, "num_hidden_layers": 4, "max_position_embeddings": 4096, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
# tiny_moe and a phi-3-mini of its width and its active size
MODELS = {
    "tiny MoE": transformers.PhimoeConfig(
        **SHAPE, hidden_size=256, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=400, num_local_experts=16, num_experts_per_tok=2, attention_bias=True,
        lm_head_bias=True, router_jitter_noise=0.01, rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0,
        },
    ),
    "tiny mini": transformers.Phi3Config(
        **SHAPE, hidden_size=256, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=800,
    ),
}  # fmt: skip
EXPERTS = ("eager", "batched_mm", "grouped_mm")
_DECODED = 32
_PROMPTS = 8


def main() -> None:
    """Measure every model, dtype and phase; print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--json", type=Path, help="write the numbers and their provenance")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    print(f"{'model':<11}{'dtype':<10}{'phase':<17}{'ours ms':>9}{'theirs':>9}{'ratio':>7}"
          f"{'quartiles':>14}  their experts")  # fmt: skip
    for name, config in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for row in compare(name, config, dtype, arguments.length, arguments.repeats):
                rows.append(row)
                low, high = row["quartiles"]
                print(
                    f"{name:<11}{row['dtype']:<10}{row['phase']:<17}{row['ours_ms']:>9.2f}"
                    f"{row['theirs_ms']:>9.2f}{row['ratio']:>7.2f}"
                    f"{f'{low:.2f} to {high:.2f}':>14}  {row['their_experts'] or '-'}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")


def compare(
    name: str, config: transformers.PreTrainedConfig, dtype: torch.dtype, length: int, repeats: int
) -> list[dict]:
    """Return one row for prefill, one decode step and a whole greedy generation."""
    torch.manual_seed(0)
    tokens = torch.randint(1, config.vocab_size, (1, length))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "theirs"), Path(folder, "ours")
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(source)
        subprocess.run(
            [sys.executable, str(ROOT / "launch/convert.py"), f"source={source}",
             f"target={target}"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        )  # fmt: skip
        ours = load_run(str(target), device=torch.device("cpu"), on_skip=print).model
        theirs, experts = fastest(source, config, dtype, tokens)
    with torch.inference_mode():
        expected, got = theirs(tokens).logits.float(), ours(tokens).logits.float()
        agreement = (expected.argmax(-1) == got.argmax(-1)).float().mean().item()
        if agreement < (0.999 if dtype == torch.float32 else 0.9):
            raise SystemExit(f"{name}, {dtype}: only {agreement:.1%} of the predictions agree")
        rows = []
        for phase, (mine, other) in phases(ours, theirs, tokens).items():
            pairs = alternate(mine, other, repeats)
            ratios = sorted(other / mine for mine, other in pairs)
            quartiles = statistics.quantiles(ratios, n=4)
            rows.append({
                "model": name, "dtype": str(dtype).removeprefix("torch."), "phase": phase,
                "ours_ms": 1e3 * statistics.median(mine for mine, _ in pairs),
                "theirs_ms": 1e3 * statistics.median(other for _, other in pairs),
                "ratio": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]],
                "their_experts": experts, "agreement": agreement,
            })  # fmt: skip
    return rows


def phases(
    ours: Transformer, theirs: Any, tokens: torch.Tensor
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> the same work done by us and by transformers."""
    length, dtype = tokens.shape[1], ours.embed.weight.dtype
    vocab_size = ours.config.vocab_size
    prompts = [torch.randint(1, vocab_size, (1, length)) for _ in range(_PROMPTS)]
    batches = [torch.randint(1, vocab_size, (4, length // 2)) for _ in range(_PROMPTS)]
    caches = KeyValueCache.empty(
        ours.config, batch=1, length=length + 1, device=tokens.device, dtype=dtype
    )
    ours(tokens, caches=caches)
    past = theirs(tokens, use_cache=True).past_key_values
    one = tokens[:, :1]
    sampling = Sampling(max_new_tokens=_DECODED, temperature=0.0)

    def their_step() -> None:
        theirs(one, past_key_values=past, use_cache=True)
        past.crop(-1)

    def prefill(texts: list[torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
        # both sides read the same texts in the same order, and rarely the same text twice: routing
        # makes other row counts in each, as it does in use
        mine, other = itertools.cycle(texts), itertools.cycle(texts)
        return (
            lambda: ours(next(mine), last_only=True),
            lambda: theirs(next(other), use_cache=False, logits_to_keep=1),
        )

    return {
        f"prefill 1 x {length}": prefill(prompts),
        f"prefill 4 x {length // 2}": prefill(batches),
        "decode": (lambda: ours(one, caches=caches, start=length), their_step),
        "generate": (
            lambda: list(generate(ours, tokens[0, :64].tolist(), sampling, stop_ids=())),
            lambda: theirs.generate(
                tokens[:, :64], max_new_tokens=_DECODED, min_new_tokens=_DECODED, do_sample=False
            ),
        ),
    }


def fastest(
    source: Path, config: transformers.PreTrainedConfig, dtype: torch.dtype, tokens: torch.Tensor
) -> tuple[Any, str]:
    """Return transformers' model with the experts that prefill these tokens soonest, and which."""
    if not hasattr(config, "num_local_experts"):
        return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval(), ""
    best: tuple[float, Any, str] | None = None
    for experts in EXPERTS:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, experts_implementation=experts
        ).eval()
        with torch.inference_mode():
            seconds = min(clock(lambda: model(tokens, use_cache=False)) for _ in range(4))  # noqa: B023
        if best is None or seconds < best[0]:
            best = (seconds, model, experts)
    assert best is not None
    return best[1], best[2]


def alternate(
    mine: Callable[[], object], other: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of each, taken in turns after two calls of warm-up."""
    for _ in range(2):
        mine()
        other()
    return [(clock(mine), clock(other)) for _ in range(repeats)]


def clock(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def provenance() -> dict:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "commit": commit, "cpu": model[0].partition(":")[2].strip() if model else "unknown",
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
