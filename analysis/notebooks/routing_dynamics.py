# ---
# jupyter:
#   jupytext:
#     formats: ipynb,notebooks//py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How routing forms during training
#
# From three sources, each of which can say something the others cannot
# ([over_steps](over_steps.py)): the log (`metrics.jsonl`) has the load of every step; the routing
# recorded in training (`train.trace_every=10`) has the tokens of some steps with their domains;
# traces of several checkpoints have the *same* tokens each time, and only they show whether a
# token's experts changed.
#
# One run is one draw: another seed gives the same kind of curves but other experts, and nothing
# below says how far two seeds lie apart.

# %%
from analysis import figure_steps
from analysis.notebook import show, start
from analysis.open_run import recorded_routing, traces_to_compare
from analysis.over_steps import log_series

RUN = None  # a run folder; None: that of PHIMOE_RUN, or the newest under runs/
NUM_BLOCKS = 60  # points of a curve, each the mean of the steps around it

run = start(RUN)
run.require_sparse()
series = log_series(run.metrics, top_k=run.model.top_k, num_blocks=NUM_BLOCKS)

# %% [markdown]
# ## Load
#
# Each expert's share of its layer's choices over the even share ([load_ratio](utilisation.py)),
# from what the log says of every step. Experts trade places early and settle later. Colours of a
# few steps are mostly the text of these steps: compare what lasts, not single cells.

# %%
show(figure_steps.load_over_steps(series))

# %% [markdown]
# ## Evenness and decision
#
# *Load imbalance* is the coefficient of variation of the load
# ([coefficient_of_variation](utilisation.py)); dashed is what even, independent routing of as
# many tokens would give, which real text never reaches because its tokens are alike. It falls
# with the number of steps in a point, so compare runs at the same `NUM_BLOCKS`.
#
# *Entropy* is that of the router's softmax, mean over tokens: it begins near log E, undecided,
# and falls as logits grow. Low entropy is not specialisation by itself. For SparseMixer it does
# not say how sure the choice is, since its threshold is relative to the logits. The *balance
# loss* is K for perfectly even routing and moves little: a difference in its second decimal is
# much.

# %%
show(figure_steps.settling(series))

# %% [markdown]
# ## Domains
#
# How much of the uncertainty about the chosen experts goes away when the token's domain is known
# ([domain_dependence](over_steps.py)), from the routing recorded in training. Each point has
# other tokens, few of them, and what so few seem to explain is mostly noise: where a band reaches
# 0, no dependence is seen. Record more often (`train.trace_every`) for narrower bands.

# %%
show(figure_steps.domain_figure_over_steps(recorded_routing(run)))

# %% [markdown]
# ## Router saturation
#
# Of the experts that a token has at the last traced checkpoint, the part that it had already
# ([saturation](overlap.py), as OLMoE defines it), on the same tokens for every checkpoint; dashed
# is chance for these loads. It reaches 1 at the last checkpoint by definition, and rises towards
# it even in a model that goes on changing: a steep end says that routing had not settled, a flat
# one that it had. Needs traces of two or more checkpoints in `<run>/traces/`, and
# `train.keep_last` large enough that checkpoints are still there; the message names the command.

# %%
show(figure_steps.saturation_figure(traces_to_compare(run)))
