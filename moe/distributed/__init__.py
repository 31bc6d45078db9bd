"""How ranks are laid out and how they talk."""
