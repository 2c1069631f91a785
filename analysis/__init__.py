"""Numbers and pictures of a run and its routing, from its files alone; numpy, and no torch.

Of a run: plots draws its metrics. Of a routing trace (moe.trace): count_trace counts it in one
pass; the counts add, and each file below turns some of them into an answer.

how even is the load            balance, with the definitions in utilisation
what are experts chosen for     specialisation, of routing_counts (domains) and key_counts (tokens)
which are chosen together       co_activation
do layers agree                 layer_agreement
how close was the next choice   margins, sparsemixer_mask
do two checkpoints agree        overlap (saturation, stability), of traces side by side (aligned)
what does an expert do          ablation
how sure is all this            bootstrap
over the steps of training      over_steps, learning_curves
several runs, seeds, intervals  compare_runs, comparison_report
what does it look like          figure_trace, figure_maps, figure_steps, figure_curves,
                                figure_learning, comparison_figure
where do a notebook's runs lie  open_run, notebook; the notebooks' text is in notebooks/
a page to click through         explore/, started by launch/explore.py
"""
