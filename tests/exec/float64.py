"""Importing this first makes a process compute in float64 what it would in fp32.

Layouts then differ by rounding of 1e-16, so a bound of 1e-9 shows every mistake. Models and torch
say fp32 in many places (norms, rotary tables, losses), and all of them must mean float64.
"""

import torch

torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
torch.set_default_dtype(torch.float64)
