"""Rewards that are networks of transformers."""
