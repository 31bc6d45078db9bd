"""From a source of text to batches of token ids: corpus, tokenizer, token cache, sample order."""
