"""Sparse mixture-of-experts language models: the model, its data, its training engine and its accounting."""
