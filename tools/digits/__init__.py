"""A picture task that anyone can build offline: the sum of two handwritten digits, and a small model to begin with."""
