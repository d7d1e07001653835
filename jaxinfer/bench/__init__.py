"""How fast a model answers here, measured beside the limit of the memory and beside its peers."""
