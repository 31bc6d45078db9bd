"""Loading a trained run and generating text from it."""
