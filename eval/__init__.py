"""Scorers, one file a benchmark (`python -m eval.arc`, ...), what they share, and `eval.compare` for two results."""
