"""Attention of many new tokens, as in prefill, over the keys up to their own."""
