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
# # Dense against sparse
#
# Does a model of experts, of which a token uses few, reach a lower loss than a dense model, and
# at what price? Reads `analysis/reports/dense_and_sparse/` (`runs.csv` and `curves.csv`, written
# by `launch/compare.py`), whose `report.md` has the intervals of the differences and the
# conclusion; or two or more run folders of the same data, named in `RUNS` below or in
# `PHIMOE_RUN`, as PATH has folders.
#
# "Better" is said of a price that is held equal: tokens seen, FLOPs of training, parameters that
# a token uses, or parameters in all. The figures show the first two; the table says the others.

# %%
from analysis.figure_learning import end_figures, learning_figure
from analysis.learning_curves import arms_table, find_curves
from analysis.notebook import prepare, show

RUNS = {}  # name: run folder, e.g. {"dense": "runs/a", "sparse": "runs/b"}; {}: PHIMOE_RUN
REPORT = None  # a folder of launch/compare.py; None: analysis/reports/dense_and_sparse

prepare()
curves, source = find_curves(RUNS, report=REPORT)
print(f"read: {source}")

# %% [markdown]
# ## What is compared
#
# *Active* are the parameters that one token uses ([num_parameters](../moe/model_config.py)).
# FLOPs of a report are counted from every matrix product; of run folders they are 6 for each
# active parameter beyond the embedding ([curve_of_run](learning_curves.py)), which leaves
# attention's own products out. Load CV is the deviation of the experts' load over its mean, 0
# when even: a sparse model whose load collapsed is no fair example of its kind.

# %%
print(arms_table(curves))

# %% [markdown]
# ## Learning curves
#
# Loss on held-out text against what training had cost by then. A curve that lies below another at
# the same tokens may lie above it at the same FLOPs. Points before the end are not what a shorter
# run would have reached: its learning rate would have fallen earlier. Compare ends.

# %%
show(learning_figure(curves))

# %% [markdown]
# ## Where they end, by domain
#
# Each dot is a run. With one run of each arm the difference of two dots has no interval: another
# seed moves a dot by as much as the dots of an arm lie apart in the report, and no conclusion
# should rest on less. Where arms have several seeds, bars are Student's t-intervals of their mean
# ([mean_over_seeds](compare_runs.py)), wide with three seeds (4.3 standard errors); a last figure
# pairs the runs of each seed, which read the same text in the same order, and shows the
# differences: look there, not at whether two bars meet. Domains are not independent looks: a
# model that is better is better in most of them.

# %%
show(*end_figures(curves))
