"""SFT data: rows to token ids (sft.py), the paper's datasets (download.py), the embedded default (tiny/)."""
