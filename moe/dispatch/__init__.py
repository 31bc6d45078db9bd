"""Tokens to their experts and back: the interface, within one process, and between ranks."""
