"""Text to tokens to shards to windows to batches; each file is one stage.

corpus, python_corpus: documents. survey, selection: which are kept, and for which split.
tokenizer, tokenizer_training, tokenise: token ids. manifest, shards, shard_maps, document_table:
files on disk, written and mapped. prepare, prepared_folder: a whole prepared folder.
permutation, epoch_order, packing, loader: training batches.
"""
