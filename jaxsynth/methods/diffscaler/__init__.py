"""DiffScaler: one frozen diffusion transformer, many data sets."""
