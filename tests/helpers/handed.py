"""Records the arguments with which a model calls torch's attention."""

from __future__ import annotations

from typing import Any

from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Handed(TorchFunctionMode):
    """Records the shapes and options of every call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.calls.append({"shapes": [tuple(tensor.shape) for tensor in args], "key": args[1], **kwargs})
        return func(*args, **(kwargs or {}))
