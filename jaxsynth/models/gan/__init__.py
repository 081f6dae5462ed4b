"""Image-to-image GANs: E2GAN, pix2pix, PatchGAN."""
