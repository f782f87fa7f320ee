"""Codecs: how a segment turns keys and values into bytes and computes on them."""
