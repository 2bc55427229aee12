"""A transfer without a device, which spoils what nobody may read."""

import torch

from dpo_cache.lm.layerwise.transfer import Fill, Wait

SPOILED = 0xFF  # as float32, float16 and bfloat16: NaN


class FakeTransfer:
    """Bytes arrive when they are waited for. Until then, and from the moment that a new content is on its way,
    the target holds NaN: who reads a buffer too early, or one that is used again, computes NaN.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.sent: list[int] = []  # number of bytes
        self.targets: set[int] = set()  # addresses

    def send(self, slot: int, target: torch.Tensor, fill: Fill) -> Wait:
        content = torch.empty(target.numel(), dtype=torch.uint8)
        fill(content)
        target.fill_(SPOILED)
        self.sent.append(target.numel())
        self.targets.add(target.untyped_storage().data_ptr())

        def wait() -> None:
            target.copy_(content)

        return wait

    def close(self) -> None:
        pass
