"""The decoder: attention, the mixture-of-experts layer with its router, experts and losses, and initialization."""
