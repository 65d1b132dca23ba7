"""The buffer for workspace and gathered pages in vLLM's own workspace, reserved while vLLM profiles memory.

vLLM gives its KV cache what is left after the profile run. What is allocated later would not be in that account, so the
greatest row's bytes are taken from vLLM's own workspace then, up to the cap, and no row asks for more.
"""

import torch

from pbsattn.serving import memory


class Buffer(memory.Buffer):
    """The buffer of one process."""

    def _bytes(self, size: int, device: torch.device) -> torch.Tensor:
        from vllm.v1.worker import workspace

        if not workspace.is_workspace_manager_initialized():  # vLLM keeps no workspace, as on the CPU
            return super()._bytes(size, device)
        try:
            (whole,) = workspace.current_workspace_manager().get_simultaneous(((size,), torch.uint8))
            return whole
        except (AssertionError, torch.OutOfMemoryError) as error:  # the first where vLLM lets its workspace grow no more
            raise MemoryError(f"{size} bytes of workspace: {error}") from None


buffer = Buffer()
