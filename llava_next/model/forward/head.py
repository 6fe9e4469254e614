"""The LM head whose forward is the loss.

Under FSDP2 the head is a unit of its own: its weight exists in full only inside its own `forward`. So the loss is
computed there, in chunks of the supervised positions: logits over all positions in fp32 would be 12 GB for a 32K
vocabulary and 48 GB for a 128K one at 37K tokens, of which 5 to 10 % are supervised.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions; fp32 logits of a chunk are 0.13 GB (32K vocabulary) to 0.6 GB (152K)


def chunked_targets(targets: int) -> int:
    """Of a micro-batch's targets those whose logits backward computes again: all of them, or none in a single chunk."""
    return targets if targets > CHUNK else 0


class LossHead(nn.Linear):
    """`lm_head` with a second way to be called; weight, key and plain use are those of `nn.Linear`."""

    def forward(self, hidden: torch.Tensor, target_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or the negative log-likelihood of given targets.

        Args:
            hidden: `[..., hidden_size]`; with targets `[K, hidden_size]`.
            target_ids: int64 `[K]`, the token that each position should predict.

        Returns:
            Without targets logits `[..., vocab]`; with targets the loss per position, float32 `[K]`.
        """
        if target_ids is None:
            return super().forward(hidden)
        chunks = zip(hidden.split(CHUNK), target_ids.split(CHUNK), strict=True)
        if not torch.is_grad_enabled() or not chunked_targets(hidden.shape[0]):
            return torch.cat([self._nll(h, t) for h, t in chunks])
        # Recomputing a chunk's logits in backward costs one more head matmul on the supervised tokens only and keeps
        # one chunk of logits alive instead of all of them.
        return torch.cat([checkpoint(self._nll, h, t, use_reentrant=False) for h, t in chunks])

    def _nll(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return F.cross_entropy(logits.float(), target_ids, reduction="none")
