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
# # How a run uses its experts
#
# From a routing trace: for every token, the experts that each layer chose. Needs a run, and a
# trace of one of its checkpoints in `<run>/traces/`; the message of the next cells names the
# commands. Without a trace the last steps that training recorded (`train.trace_every`) are shown,
# whose choices SparseMixer sampled: they are noisier than those of a checkpoint.
#
# Every number comes from a function in `analysis/` that says how it is defined and where the
# definition is from. Intervals draw whole documents again ([bootstrap](bootstrap.py)), because
# tokens of one document are alike: they are for these kinds of text and this one run, and say
# nothing of what another seed would give.

# %%
from analysis import figure_trace
from analysis.balance import balance
from analysis.count_trace import count_trace
from analysis.notebook import show, start
from analysis.open_run import routing_to_show
from analysis.token_table import token_table

RUN = None  # a run folder; None: that of PHIMOE_RUN, or the newest under runs/
TRACE = None  # a folder of launch/trace.py; None: that of the run's last traced checkpoint
LAYER = 0  # whose tokens are listed

run = start(RUN)
trace, what = routing_to_show(run, TRACE)
print(f"trace: {trace.folder}\n{what}")
counts = count_trace(trace, vocab_size=run.model.vocab_size, threshold=run.mask_threshold)

# %% [markdown]
# ## Load
#
# An expert's load is its share of the layer's choices over the even share
# ([load_ratio](utilisation.py)): 1 is even, 2 twice as much, and an expert that no token chose is
# dead. Numbers whose interval excludes 1 are bold. With many documents nearly all are bold: then
# the size matters, not the boldness. A dead expert is dead on this text; other text may use it.
#
# The same in one number a layer ([utilisation](utilisation.py)). The coefficient of variation is
# the deviation of the loads over their mean; max violation, how much more than the even share the
# busiest expert has, which is what a step waits for when experts lie on several devices; Gini,
# half the mean difference of two experts over the mean. Noise alone makes all three larger than
# 0, and the intervals take that out ([bootstrap_deviation](bootstrap.py)): they may lie below the
# point.

# %%
evenness = balance(counts.routing)
show(figure_trace.load_figure(evenness), figure_trace.imbalance_figure(evenness))

# %% [markdown]
# ## Domains
#
# Lift is the expert's share of a domain's choices over its share of all
# ([lift](specialisation.py)); a dot is where its interval excludes 1. About one dot in twenty is
# there by chance. A lift above 1 does not say that the expert is *for* the domain: the domain may
# only hold more of the words that the expert takes, which the next figure is about.

# %%
show(figure_trace.domain_figure(counts.routing, trace.info.domains))

# %% [markdown]
# ## Tokens
#
# How much of the uncertainty about a layer's first choice goes away when the token id, its
# position or its domain is known ([share_explained](specialisation.py)): 0, nothing; 1, all of
# it. The three overlap and do not add up. Small models, and first layers, choose mostly by token
# id. Below, the ids that each expert takes most reliably ([top_keys](specialisation.py)); ids
# seen fewer than 20 times are left out, since one token explains itself.

# %%
show(figure_trace.explained_figure(counts, min_count=20))
print(token_table(counts.tokens, trace.vocabulary(), layer=LAYER, min_count=20))

# %% [markdown]
# ## Experts chosen together
#
# Tokens that chose both experts, over how many would if partners were drawn by load alone
# ([normalised_co_activation](co_activation.py)). Purple pairs avoid each other: they may stand in
# for one another, or answer different tokens. Rare pairs of rarely used experts vary most; read
# this beside the load.

# %%
show(figure_trace.pairs_figure(counts))

# %% [markdown]
# ## Position
#
# First choices by place in the document, in buckets of doubling width
# ([position_bucket](key_counts.py)). Position 0 is often the same token in every document, so
# that one expert has all of it: this is the token, not the place.

# %%
show(figure_trace.position_figure(counts.positions))

# %% [markdown]
# ## Margins
#
# The margin is the gap between neighbouring logits ([margins](margins.py)): near 0 the next
# expert was nearly chosen, and a small change of the weights, or of the precision, will choose
# it. For SparseMixer the second figure shows how many experts its threshold left out, and how
# many tokens had only one left ([sparsemixer_mask](sparsemixer_mask.py)): that choice has weight
# 1, and at evaluation its logits no gradient. The threshold is relative to the logits' size, so a
# small margin can still mask nearly all.

# %%
show(*figure_trace.margin_figures(counts.margins))
