"""The `jaxsynth` command: parses, calls, prints."""
