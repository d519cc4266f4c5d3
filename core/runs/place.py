"""Where a run runs: its device, and which of how many processes this is, as `accelerate launch` says.

There is no `Accelerator` here: precision is a matter of the weights' dtype, and gradients are averaged by the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Place:
    def __init__(self, cpu: bool = False):
        from accelerate import PartialState

        self._state = PartialState(cpu=cpu)
        assert self._state.device is not None
        self.device: torch.device = self._state.device
        self.process: int = self._state.process_index
        self.processes: int = self._state.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes and tells."""
        return self._state.is_main_process

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until every process is here."""
        self._state.wait_for_everyone()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all processes, in every process."""
        if self.processes == 1:
            return tensor
        from accelerate.utils import reduce

        mean: Any = reduce(tensor, "mean")
        return mean
