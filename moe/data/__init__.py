"""Text to tokens to shards to windows to batches; each file is one stage.

corpus, python_corpus: documents. survey, selection: which are kept, and for which split.
tokenizer, tokenizer_training, tokenise: token ids. shards, manifest: files on disk.
prepare, prepared_folder: a whole prepared folder. permutation, packing, loader: training batches.
"""
