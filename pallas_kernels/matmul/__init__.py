"""Activations times int8 or int4 weights with scales; the weights are read as they are stored."""
