"""Serving on a machine whose memory is smaller than the model: the expert store, and policies."""
