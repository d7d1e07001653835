"""New keys and values written into a cache, a position a row, in place."""
