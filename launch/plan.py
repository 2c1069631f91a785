"""Say what a training run needs on a cluster that need not be there: memory, bytes, time, MFU.

usage: python launch/plan.py [model=NAME] [cluster=NAME] [num_gpus=N] [key=value ...]

examples:
  python launch/plan.py
  python launch/plan.py num_gpus=64 parallel.expert_parallel_size=8 parallel.zero_stage=2 days=0
  python launch/plan.py cluster=h200x8 parallel.zero_stage=0 activation_checkpointing=false
Without arguments it is a worked example, the run that the model card of Phi-3.5-MoE describes: what
23 days for 4.9T tokens on 512 H100 imply, what our plan predicts, and what does not fit and why.
Nothing is allocated. The formulas are in moe/plan/; --dry-run of launch/train.py prints the same
plan for a run that is about to start.
"""

from __future__ import annotations

from command import run_command

from moe.plan_config import PlanConfig


def plan(config: PlanConfig) -> None:
    """Print the plan of one layout, the whole run's time, and the layouts beside it."""
    from moe.plan.compare import compare_lines, run_lines
    from moe.plan.layout import planned_layout
    from moe.plan.report import layout_lines

    layout = planned_layout(config)
    sections = [
        layout_lines(layout, config.cluster),
        run_lines(layout, config.cluster, tokens=config.tokens, days=config.days),
        compare_lines(layout, config.cluster),
    ]
    print("\n\n".join("\n".join(section) for section in sections if section))


if __name__ == "__main__":
    run_command("plan", PlanConfig, plan, about=__doc__, writes=None)
