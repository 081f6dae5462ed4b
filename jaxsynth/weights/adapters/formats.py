"""The formats that adapters are written in, by name; without JAX, for the command line."""

FORMATS = ("peft", "diffusers", "kohya", "lycoris", "comfyui", "a1111", "jaxsynth")
