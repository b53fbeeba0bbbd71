"""Prompts and images to train on."""
