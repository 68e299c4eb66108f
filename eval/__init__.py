"""Benchmarks, one file each (`python -m eval.arc`, ...), what they share, and `eval.compare` for two results."""
