"""How fast it is: our layer against others and against floors, training steps, split experts, generation."""
