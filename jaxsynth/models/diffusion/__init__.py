"""Networks of diffusion models: UNet, DiT, VAE, ControlNet."""
