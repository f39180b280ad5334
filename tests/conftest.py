"""Tiny tensors gain nothing from a second thread, and waiting for it makes tests on two cores several times slower."""

import torch

torch.set_num_threads(1)
