"""Settings of all tests: no network, no accelerator for DeepSpeed, one thread, and a fixed seed for each test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed prints its search for an accelerator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
