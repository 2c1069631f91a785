"""Published checkpoints in and out: Hugging Face folders of the Phi-3 family and our own."""
