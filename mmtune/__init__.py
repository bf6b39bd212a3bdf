"""Assemble a vision-language model from parts, tune each part, see what was gained and what was forgotten."""

__version__ = "0.1.0"
