"""Measuring: perplexity with and without a store, weights fitted on validation text, and where a token came from."""
