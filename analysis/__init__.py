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
what does it look like          figure_maps, figure_curves
"""
