"""Measurements of speed and memory. README.md says what each program measures."""
