"""Quantize a trained sentence encoder and show what it gives: ``python -m demo``, or ``make demo``."""
