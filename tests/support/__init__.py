"""What tests share: paths, small models and runs, real ranks, launched processes."""
