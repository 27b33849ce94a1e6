"""Calls of every public name with one argument wrong: what comes back. See ``outcomes.py``."""
