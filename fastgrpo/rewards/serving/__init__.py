"""Rewards behind HTTP: the service, its client and what they send each other."""
