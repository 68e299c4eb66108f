"""SFT data: rows to token ids (sft, templates), the paper's datasets (download), the embedded default (tiny/)."""
