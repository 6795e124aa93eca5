"""The operating system's part: processes that end with their parent, and files that appear whole or not at all."""
