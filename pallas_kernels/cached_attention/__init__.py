"""Attention of a block of new tokens over a cache with per-row lengths."""
