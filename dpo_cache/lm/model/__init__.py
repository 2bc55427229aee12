"""A checkpoint as a model: loaded, named, quantized, with its adapter."""
