"""Serving: many requests in one flat forward, each over its own compressed cache."""
