"""What a training run is made of: scoring, packing, the tiled head, LoRA, ranks, the run folder."""
