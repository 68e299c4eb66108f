"""Scorers, one file a benchmark (`python -m eval.arc`, `python -m eval.gsm8k`), and what they share."""
