"""Hypothesis profiles: HYPOTHESIS_PROFILE=deep for a long search, ci for one that is the same every time."""

import os

import torch
from hypothesis import settings

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)  # the tests' tensors are tiny: threads would only wait for each other
