"""The decoder: attention, the MoE layer with its router, experts and losses, and initial weights."""

LOGITS_AT_ONCE = 2**25  # in the loss: 128 MiB in fp32, three times that with their gradients
