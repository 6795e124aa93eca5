"""The parts that the vision towers of all families share, and the sharing of images among ranks."""
