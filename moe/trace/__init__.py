"""Routing traces: which experts every token took, on disk in Parquet, read, recorded, replayed.

batch: arrays of some tokens. info: what a trace's JSON says. parquet: arrays to files and back.
write: parts beside the running model. documents, corpus: a model over a prepared folder.
record: a training run. read: the whole trace, without torch. replay, ablate: routings forced.
"""
