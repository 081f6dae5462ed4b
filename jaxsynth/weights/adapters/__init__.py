"""Adapter files: peft, diffusers, kohya, LyCORIS, ComfyUI, A1111 and our own."""
