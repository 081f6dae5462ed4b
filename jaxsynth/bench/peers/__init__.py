"""The libraries that are timed beside ours."""
