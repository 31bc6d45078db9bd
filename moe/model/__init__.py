"""The decoder: attention, the MoE layer with its router, experts and losses, and initial weights."""
