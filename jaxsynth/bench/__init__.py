"""`jaxsynth bench`: our programs and torch's (diffusers, peft) timed side by side in one process.

Both sides load the same random weights from the same folder, and a case is timed only after both
have computed the same numbers, so that a ratio never compares two different computations.
"""
